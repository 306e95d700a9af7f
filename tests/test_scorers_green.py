"""green.py: the package's prompt to the letter, its parser by hand, and a tiny judge in the real layout."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evidence import metrics
from scorers import green
from tiny import models as tiny_models

ANSWER = """[Explanation]:
The candidate names the effusion on the wrong side and misses the fractures. "1. no" means nothing here.

[Clinically Significant Errors]:
(a) False report of a finding in the candidate: 0.
(b) Missing a finding present in the reference: 2. Rib fractures; Port catheter.
(c) Misidentification of a finding's anatomic location/position: 1. Effusion is right: 3. not left.
(d) Misassessment of the severity of a finding: 0
(e) Mentioning a comparison that isn't in the reference: 0.
(f) Omitting a comparison detailing a change from a prior study: 0.

[Clinically Insignificant Errors]:
(a) False report of a finding in the candidate: 4. One; Two; Three; Four.

[Matched Findings]:
2. No pneumothorax; Clear left lung."""
# the template that the package sets on the judge's tokenizer (green_score/green.py)
TEMPLATE = (
    "{% for message in messages %}\n{% if message['from'] == 'human' %}\n{{ '<|user|>\n' + message['value'] + eos_token"
    " }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A random Llama, 32 wide, saved as the real judge is: config, safetensors, tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = tiny_models.policy_tokenizer([green.PROMPT, ANSWER], vocab_size=600)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------- prompt


def test_the_prompt_is_the_package_s_to_the_letter():
    """SHA-256 of what the package's make_prompt("R", "C") returns."""
    digest = hashlib.sha256(green.PROMPT.format(reference="R", candidate="C").encode()).hexdigest()
    assert digest == "386063ef7003190f650e41f65063da099b58ad54253a7765014699d258392062"


def test_the_question_is_what_the_package_s_chat_template_gives(judge):
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    prompt = green.PROMPT.format(reference="Clear {lungs}.", candidate="Effusion.")
    wanted = tokenizer.apply_chat_template(
        [{"from": "human", "value": prompt}], chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert green.CHAT.format(prompt=prompt, eos=tokenizer.eos_token) == wanted
    assert "{lungs}" in wanted and wanted.endswith("</s>\n<|assistant|>\n")


# ---------------------------------------------------------------------------------------------------------- parser


def test_a_recorded_style_answer():
    assert green.green(ANSWER) == pytest.approx(2 / (2 + 3))


def answer(significant="(a) X: 1. Y.", matched="3. A; B; C."):
    return f"[Clinically Significant Errors]:\n{significant}\n\n[Matched Findings]:\n{matched}"


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (answer(), 3 / 4),
        (answer("None."), 1),
        (answer("No errors."), 1),
        (answer("(b) X: 2. Y; Z.\n(a) X: 1. Y."), 3 / 6),
        (answer("(1) X: 2. Y; Z.\n(6) X: 1. Y."), 3 / 6),  # kinds by number
        (answer("(f) X: 12. Y."), 3 / 15),
        (answer("(a) X: 5. Y.\n(b) X: 1. Y.\n(a) X: 2. Y."), 3 / 6),  # of a kind that is listed twice the last counts
        (answer(matched="0."), 0),
        (answer(matched="None."), 0),
        (answer("None.", matched="No matched findings."), 0),  # nothing wrong, nothing matched
        (answer().split("[Matched")[0], None),  # cut off before the matches
        (answer().split("\n\n")[1], None),  # no section of errors
        (answer(matched="Clear lungs; normal heart."), None),  # a list without its count
        (answer("(a) False report of a finding: pneumothorax."), None),
        (answer("Two findings are wrong."), None),
        (answer("").replace("\n\n\n", "\n\n[Clinically Insignificant Errors]:\n(a) X: 1. Y.\n\n"), None),
        ("", None),
    ],
)
def test_scores_by_hand(response, score):
    assert green.green(response) == (None if score is None else pytest.approx(score))


# ----------------------------------------------------------------------------------------------------------- model


def test_a_tiny_judge_answers_and_what_cannot_be_read_is_counted(judge):
    score = green.load_green(str(judge), max_new_tokens=6)
    candidates, references = ["The lungs are clear.", "Left effusion.", "x"], ["Clear lungs.", "No effusion.", "y"]
    assert score(candidates, references) == [None] * 3  # random weights write no counts
    stats = metrics.collect([[c] for c in candidates], references, green=score)
    assert stats["green"].tolist() == [[0, 0, 1]] * 3
    summary = metrics.summarise({"row": stats}, (), 20, 0)["row"]
    assert summary["green"]["unread"] == 3 and summary["green"]["value"] != summary["green"]["value"]  # NaN, not 0


def test_the_answer_alone_is_parsed_and_each_pair_is_asked_once(judge, monkeypatch):
    asked = []

    def generate(self, input_ids, attention_mask, do_sample, eos_token_id, pad_token_id, **other):
        tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
        assert not do_sample and (attention_mask[:, -1] == 1).all()  # padded on the left
        asked.extend(tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        said = tokenizer([ANSWER] * len(input_ids), return_tensors="pt")["input_ids"]
        end = torch.full((len(input_ids), 1), eos_token_id)
        return torch.cat([input_ids, said, end], dim=1)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", generate)
    score = green.load_green(str(judge))
    assert score(["one", "a longer two", "one"], ["r"] * 3) == pytest.approx([0.4] * 3)
    assert score(["one"], ["s"]) == pytest.approx([0.4])
    assert len(asked) == 3  # two pairs, then one: the repeated pair is remembered
    assert "3. Candidate Report:\n    one\n" in asked[0] and "2. Reference Report:\n    r\n" in asked[0]


def test_padding_does_not_change_an_answer(judge, monkeypatch):
    answers = []
    monkeypatch.setattr(green, "green", lambda text: answers.append(text) or 0.0)
    score = green.load_green(str(judge), max_new_tokens=8)
    score(["short", "a much longer report than the other one"], ["r", "r"])
    together = list(answers)
    for text in ("short", "a much longer report than the other one"):
        green.load_green(str(judge), max_new_tokens=8)([text], ["r"])
    assert answers[2:] == together and len(set(together)) == 2


def test_a_judge_that_is_not_whole_is_refused(judge, tmp_path):
    """A weight that is missing or NaN, a tokenizer that is empty or a pointer, code that comes with the weights."""
    state, name = load_file(judge / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    config = json.loads((judge / "config.json").read_text())

    def refused(match, file, content=None, tensors=None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(judge, folder)
        if tensors:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        else:
            (folder / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"eval.green: cannot load .*{match}") as error:
            green.load_green(str(folder))
        assert "\n" not in str(error.value)

    refused(f"not in it, e.g. {name}", "model.safetensors", tensors={k: v for k, v in state.items() if k != name})
    refused(f"{name} holds NaN", "model.safetensors", tensors=state | {name: state[name] * torch.nan})
    refused("empty", "tokenizer.json", b"")
    refused("git-lfs pointer", "tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n")
    refused("'auto_map'", "config.json", json.dumps(config | {"auto_map": {"AutoModel": "own.Code"}}).encode())


def test_no_judge_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="eval.green: cannot load ") as error:
        green.load_green(str(tmp_path))
    assert "\n" not in str(error.value)
