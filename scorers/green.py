"""GREEN [Ostmeier et al. 2024, arXiv 2405.03595]: a language model lists a report's errors, their counts make a score.

The judge is `StanfordAIMI/GREEN-radllama2-7b`, or another causal language model in Hugging Face layout that was tuned
on the same prompt. Prompt, chat format, greedy decoding and parser follow the authors' package (github.com/
Stanford-AIMI/GREEN: green_score/utils.py `make_prompt`; green_score/green.py `parse_error_counts`, `compute_green`),
which cannot be installed beside current libraries. No text leaves this machine.

Where we differ: an answer without a readable count is `None`, left out of the mean and counted, while the package takes
such a count as 0; and no prompt is cut at 2048 tokens, which would lose the question's end. A report without a word, or
too long for the judge, scores 0 unasked.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from running.weights import load_tokenizer, loading
from scorers.frozen import load_whole, plain

BATCH = 8  # pairs decoded together
# what the model was tuned on, to the letter; the indent is the package's
PROMPT = Path(__file__).with_name("green_prompt.txt").read_text(encoding="utf-8")
CHAT = "<|user|>\n{prompt}{eos}\n<|assistant|>\n"  # what the package's chat template makes of one question


def green(response: str) -> float | None:
    """matched / (matched + significant errors) of an answer, 0 when nothing matched; None where no count can be read.

    A section ends at the first blank line, one that starts with "No" counts 0, of a kind of error (a-f) that is listed
    twice the last counts, and the kinds may be numbered 1-6 instead, all as in the package.
    """
    sections = ("Clinically Significant Errors", "Matched Findings")
    found = [re.search(rf"\[{name}\]:\s*([^\[\s].*?)(?:\n\s*\n|\Z)", response, re.DOTALL) for name in sections]
    if None in found:
        return None
    listed, matched = (match[1] for match in found)
    lines = re.findall(r"\(([a-f])\) (.*)", listed) or re.findall(r"\(([1-6])\) (.*)", listed)
    lines = [] if listed.startswith("No") else lines or [("a", "")]
    counts = [(kind, re.search(r"(?<=: )\d+(?=\.|\s*$)", line)) for kind, line in lines]
    matched = re.match(r"No|\d+(?=\.)", matched)
    if matched is None or any(count is None for _, count in counts):
        return None
    hits = 0 if matched[0] == "No" else int(matched[0])
    errors = sum({kind: int(count[0]) for kind, count in counts}.values())
    return hits / (hits + errors) if hits else 0.0


def load_green(path: str, device: str | torch.device = "cpu", max_new_tokens: int = 2048) -> Callable:
    """score(candidates, references) -> one GREEN in [0, 1] per pair, None where the model's answer was not readable.

    path: folder or hub name of the judge. float16 on a GPU (14 GB for 7B), float32 elsewhere. Each distinct pair is
    asked once. ValueError (one line) when there is no causal language model at `path`.
    """
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    with loading(f"eval.green: cannot load {path}", "give the folder or hub name of a causal language model"):
        tokenizer = load_tokenizer(path, padding_side="left", add_eos_token=True)  # as the package sets them
        model = load_whole(AutoModelForCausalLM, path, dtype=dtype).to(device)
    tokenizer.pad_token, end, known = tokenizer.eos_token, tokenizer.eos_token_id, {}

    @torch.inference_mode()
    def answer(chats: list[str]) -> list[str]:
        batch = tokenizer(chats, padding=True, return_tensors="pt").to(device)
        out = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_new_tokens,
                             do_sample=False, temperature=None, top_p=None, eos_token_id=end, pad_token_id=end)
        return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def score(candidates: list[str], references: list[str]) -> list[float | None]:
        pairs = [(plain(c), plain(r)) for c, r in zip(candidates, references, strict=True)]
        new = sorted({*pairs} - known.keys(), key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
        chats = {(c, r): CHAT.format(prompt=PROMPT.format(candidate=c, reference=r), eos=tokenizer.eos_token)
                 for c, r in new if c}  # fmt: skip
        most = model.config.max_position_embeddings
        asked = [pair for pair, chat in chats.items() if len(tokenizer(chat, verbose=False)["input_ids"]) < most]
        for start in tqdm(range(0, len(asked), BATCH), desc=f"{'GREEN':<28}", unit="batch", mininterval=1):
            chunk = asked[start : start + BATCH]
            known.update(zip(chunk, map(green, answer([chats[pair] for pair in chunk])), strict=True))
        return [known.get(pair, 0.0) for pair in pairs]

    return score
