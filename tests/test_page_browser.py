"""The page of a run in a real browser: headless Chromium, driven by Playwright. Run by `make test-slow`."""

import json
import shutil
from dataclasses import replace

import pytest

from config import to_dict
from data import load_studies
from evidence import page
from phantom.assets import resolve

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# no sandbox: a container's root user has none; the rest keeps it from calling home
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
TEXTS = {
    "right": "FINDINGS: Left effusion. IMPRESSION: <script>document.title = 'hacked'</script> left effusion.",
    "invented": "FINDINGS: Left effusion, edema. IMPRESSION: Edema.",
    "omitted": "FINDINGS: No effusion.",
}


def candidate(reward: float, text: str) -> dict:
    words = text.split(" ")
    found = {name: 0.5 for name in ("bleu4", "rouge_l", "bertscore", "similarity", "visual", "format")}
    found |= {"pieces": [len(words[0]), *(len(word) + 1 for word in words[1:])], "clipped": [1]}
    return {"text": text, "reward": reward} | found | {name: [0.2] * len(words) for name in ("ratio", "kl", "moved")}


@pytest.fixture(scope="module")
def path(micro, tmp_path_factory):
    """The page of a run with two recorded groups and three evaluated studies."""
    run, cfg = tmp_path_factory.mktemp("page") / "run", resolve(replace(micro, stage="2"))
    (run / "stage2").mkdir(parents=True)
    (run / "stage2" / "config.json").write_text(json.dumps(to_dict(cfg)))
    metrics = [{"k": k, "kl": 0.1, "reward/total": 1.0, "length": 9.0} for k in range(1, 6)]
    groups = [{"k": k, "id": study.id, "reference": study.report, "greedy": [TEXTS["right"], TEXTS["omitted"]],
               "candidates": [candidate(1.0, TEXTS["right"]), candidate(0.0, TEXTS["invented"])]}
              for k, study in zip((1, 4), load_studies(cfg.data, "train"), strict=False)]  # fmt: skip
    for name, rows in (("metrics", metrics), ("samples", groups)):
        (run / "stage2" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for policy, names in (("sft", ("right",) * 3), ("stage2", ("right", "invented", "omitted"))):
        (run / "eval" / "test" / policy).mkdir(parents=True)
        studies = zip(names, load_studies(cfg.data, "test"), strict=False)
        rows = [{"id": study.id, "reference": study.report, "report": TEXTS[name], "labels": ["effusion_left"]}
                for name, study in studies]  # fmt: skip
        file = run / "eval" / "test" / policy / "reports.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return page.write_page(run)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def view(browser, path):
    """view(**options): the page opened from disk; at the end there must be no message on its console and no request."""
    said, pages = [], []

    def opened(fragment: str = "", **options):
        pages.append(browser.new_page(**options))
        pages[-1].on("console", lambda message: said.append(message.text))
        pages[-1].on("pageerror", lambda error: said.append(str(error)))
        pages[-1].on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        pages[-1].goto(path.as_uri() + fragment)
        return pages[-1]

    yield opened
    for one in pages:
        assert one.title().endswith("run")
        one.close()
    assert said == []


def shown(view, deck: str) -> list[str]:
    return [card.get_attribute("id") for card in view.query_selector_all(f"{deck} .card") if card.is_visible()]


def test_arrow_keys_turn_updates_and_studies(view):
    one = view()
    assert shown(one, "#update") == ["stage2-1"] and shown(one, "#writes") == ["study-1"]
    one.keyboard.press("ArrowRight")
    assert shown(one, "#update") == ["stage2-4"]
    one.keyboard.press("ArrowRight")  # the last stays
    assert shown(one, "#update") == ["stage2-4"] and "2 of 2" in one.inner_text("#update output[aria-live]")
    one.keyboard.press("ArrowLeft")
    assert shown(one, "#update") == ["stage2-1"]
    one.focus("#writes .turn button")
    one.keyboard.press("ArrowRight")
    assert shown(one, "#writes") == ["study-2"] and shown(one, "#update") == ["stage2-1"]
    one.click("#writes [data-step='-1']")
    assert shown(one, "#writes") == ["study-1"]
    one.select_option("#update .turn select", "stage2-4")
    assert shown(one, "#update") == ["stage2-4"]


def test_filters_leave_what_they_say(view):
    one, found = view(), {}
    for value in ("differs", "invented", "omitted"):
        one.check(f".filter [value={value}]")
        found[value] = one.inner_text("#writes .turn output"), shown(one, "#writes")
        one.uncheck(f".filter [value={value}]")
    assert found == {"differs": ("1 of 2", ["study-2"]), "invented": ("1 of 1", ["study-2"]),
                     "omitted": ("1 of 1", ["study-3"])}  # fmt: skip
    one.check(".filter [value=invented]")
    assert one.input_value(".filter select") == "stage2"  # whatever else was evaluated
    one.select_option(".filter select", "sft")
    assert shown(one, "#writes") == [] and one.inner_text("#writes .turn output") == "none"
    one.uncheck(".filter [value=invented]")
    assert one.inner_text("#writes .turn output") == "1 of 3"


def test_a_dot_of_a_curve_leads_to_its_group(view):
    one = view()
    one.click(".charts a[href='#stage2-4'] circle")
    assert shown(one, "#update") == ["stage2-4"]
    assert shown(view("#stage2-4"), "#update") == ["stage2-4"]


def test_a_token_tells_its_numbers_and_changes_its_shade(view):
    one = view()
    token = one.locator("#update .card.on .tokens .report").last.locator("i").first  # of the worse candidate
    before = token.evaluate("x => getComputedStyle(x).backgroundImage")
    one.check(".card.on .tokens [value='3']")
    assert token.evaluate("x => getComputedStyle(x).backgroundImage") != before
    token.click()
    assert "“FINDINGS:”: KL 0.200, ratio 0.200" in one.inner_text(".card.on .tokens output")


@pytest.mark.parametrize("options", [{"viewport": {"width": 1200, "height": 900}}, {"color_scheme": "dark"},
                                     {"viewport": {"width": 360, "height": 700}, "is_mobile": True}])  # fmt: skip
def test_it_is_readable_on_a_phone_and_in_the_dark(view, options):
    """Nothing hangs over the window's right edge, text stands out from what is behind it, and images have words."""
    one = view(**options)
    assert one.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    light = """selector => { const x = getComputedStyle(document.querySelector(selector));
                             const [c, b] = [x.color, getComputedStyle(document.body).backgroundColor].map((v) => {
                               const [r, g, u] = v.match(/[\\d.]+/g).map((n) => ((n / 255 + 0.055) / 1.055) ** 2.4);
                               return 0.2126 * r + 0.7152 * g + 0.0722 * u + 0.05; });
                             return Math.max(c, b) / Math.min(c, b); }"""
    for selector in ("body", ".hint", "mark.right", "mark.invented", "a"):
        assert one.evaluate(light, selector) > 4.5, selector  # WCAG's AA
    words = one.eval_on_selector_all("img, svg[role=img]", "all => all.map((x) => x.alt || x.ariaLabel)")
    assert len(words) > 5 and all(words)
    names = one.eval_on_selector_all("button, select", "all => all.map((x) => x.ariaLabel || x.title)")
    assert names and all(names)


def test_it_prints(view):
    one = view()
    one.emulate_media(media="print")
    assert not one.is_visible(".turn") and one.is_visible("#stage2-1")
    one.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert all(one.eval_on_selector_all(".card.on details", "all => all.map((x) => x.open)"))
    assert one.pdf().startswith(b"%PDF")


def test_without_javascript_everything_is_there(browser, path):
    one = browser.new_page(java_script_enabled=False)
    one.goto(path.as_uri())
    assert len(shown(one, "#update")) == 2 and len(shown(one, "#writes")) == 3
