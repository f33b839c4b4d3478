"""The page in a real browser: what it shows, what it does, and what it keeps from happening."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from msd_jax import report
from msd_jax.report import collect, page
from msd_jax.report.results import Results
from tests.report.conftest import HOSTILE, TEXT, Maker

SIZES = {"desktop": (1400, 900), "phone": (390, 844)}
# Characters that act on what stands around them; line breaks and tabs do no harm.
ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]"
)


# Elements whose content is wider than they are, or that reach out of the window; not what is there for screen readers.
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter((e) => {
  const hidden = [e, ...ancestors(e)].some((a) => getComputedStyle(a).clipPath !== "none" || a.className === "skip");
  if (e.closest("svg") || e.clientWidth <= 1 || hidden) return false;
  const box = e.getBoundingClientRect();
  return e.scrollWidth > e.clientWidth + 1 || box.right > innerWidth + 1 || (box.width && box.left < -1);
  function ancestors(e) { return e.parentElement ? [e.parentElement, ...ancestors(e.parentElement)] : []; }
}).map((e) => `${e.tagName} ${e.className} ${e.textContent.slice(0, 40)}`)"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    workdir = Maker(np.random.default_rng(0), tmp_path_factory.mktemp("runs")).run(n=24, hostile=True)
    report.write(workdir)
    return workdir


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium; Debian's package brings it: apt-get install chromium")
    with sync_playwright() as playwright:
        # A sandbox of its own is not to be had where tests run as root.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a file; afterwards nothing must have gone wrong, asked for anything, or run that is not ours."""
    faults, contexts = [], []

    def open_(path: pathlib.Path, size: str = "desktop", scheme: str = "light"):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        context.on("request", lambda request: request.url == path.as_uri() or faults.append(f"request {request.url}"))
        tab = context.new_page()
        tab.on("console", lambda message: faults.append(f"console {message.text}"))
        tab.on("pageerror", lambda error: faults.append(f"error {error}"))
        tab.on("dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        tab.add_init_script("addEventListener('securitypolicyviolation', e => console.log(e.violatedDirective))")
        tab.goto(path.as_uri())
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def tab(open_page, run):
    return open_page(run / "report" / "report.html")


def shown(tab) -> int:
    return int(tab.locator("#found").text_content().split(" of ")[0].replace(",", ""))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_and_asks_for_nothing(open_page, run, size, scheme):
    tab = open_page(run / "report" / "report.html", size, scheme)
    for section in ("summary", "safety", "utility", "languages", "training", "responses", "tokens", "config"):
        assert tab.locator(f"#{section}").is_visible()
    tab.locator("#config summary").click()
    for benchmark in ("queries", ""):  # hostile texts too
        tab.select_option("[name=benchmark]", benchmark)
        assert tab.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        assert tab.evaluate(OVERFLOWING) == []
    ink, paper = tab.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
    tab.locator("#theme").click()
    assert tab.evaluate("getComputedStyle(document.body).color") != ink


def test_the_policy_stops_what_is_not_ours(open_page, run, tmp_path, browser):
    """The same page with a foreign script, style and image put in: none of them acts."""
    html = (run / "report" / "report.html").read_text()
    foreign = "<script>window.ran = 1</script><style>body { color: red }</style><img src=https://example.invalid/x>"
    foreign += "<p onclick='window.ran = 1' style='color: red' id=clicked>text</p>"
    path = tmp_path / "foreign.html"
    path.write_text(html.replace("</main>", foreign + "</main>"))
    context = browser.new_context()
    loaded, told = [], []
    context.on("requestfinished", lambda request: loaded.append(request.url))
    tab = context.new_page()
    tab.on("console", lambda message: told.append(message.text))
    tab.goto(path.as_uri())
    tab.locator("#clicked").click()
    assert tab.evaluate("window.ran") is None and loaded == [path.as_uri()]
    assert tab.evaluate("getComputedStyle(document.getElementById('clicked')).color") != "rgb(255, 0, 0)"
    assert sum("Content Security Policy" in text for text in told) >= 4
    context.close()


def test_filters_show_what_they_say(tab, run):
    results = Results(collect.workdir(run))
    pairs = results.pairs
    assert shown(tab) == len(pairs)
    tab.select_option("[name=language]", "bn")
    assert shown(tab) == sum(pair.record.language == "bn" for pair in pairs)
    assert set(tab.locator("#prompts .where").all_text_contents()) == {"Bangla"}
    tab.select_option("[name=benchmark]", "multijail")
    tab.select_option("[name=outcome]", "change:better")
    tab.select_option("[name=pass]", "t1")
    wanted = [
        pair
        for pair in pairs
        if (pair.record.language, pair.record.benchmark, pair.record.pass_name) == ("bn", "multijail", "t1")
    ]
    assert shown(tab) == sum(pair.change == "better" for pair in wanted) > 0
    tab.select_option("[name=outcome]", "verdict:unsafe → refused")
    assert shown(tab) == sum(pair.outcomes == ("unsafe", "refused") for pair in wanted) > 0
    tab.select_option("[name=outcome]", "")
    tab.fill("[name=search]", "JAIL-7")
    expect(tab.locator("#found")).to_have_text(re.compile("^1 of"))
    tab.fill("[name=search]", "no such text")
    expect(tab.locator("#found")).to_have_text(re.compile("^0 of"))
    assert tab.locator("#prompts > *").count() == 0


def test_pages_hold_all_prompts(tab):
    tab.select_option("[name=benchmark]", "multijail")
    ahead, seen = tab.locator("#pages").get_by_role("button", name="Next"), []
    while True:
        assert tab.locator("#prompts > *").count() <= page_size(tab)
        seen += tab.locator("#prompts .head").all_text_contents()
        if ahead.is_disabled():
            break
        ahead.click()
    assert len(seen) == len(set(seen)) == shown(tab) == 24 * len(TEXT) * 2


def page_size(tab) -> int:
    return tab.evaluate("PAGE")


def test_harmful_prompts_are_folded_until_they_are_opened(tab):
    tab.select_option("[name=benchmark]", "multijail")
    folded = tab.locator("#prompts > details")
    assert folded.count() == page_size(tab) == tab.locator("#prompts > *").count()
    assert "[placeholder" not in tab.locator("#prompts").text_content()  # not even hidden
    folded.first.locator("summary").click()
    first = tab.evaluate("data.prompts.find(prompt => prompt.benchmark === 'multijail').prompt")
    expect(folded.first.locator(".words").first).to_have_text(first)
    folded.nth(1).locator("summary").focus()
    tab.keyboard.press("Enter")
    expect(folded.nth(1).locator(".words").first).to_be_visible()
    assert folded.nth(1).locator(".side").count() == 2
    assert folded.nth(2).locator(".words").count() == 0
    tab.select_option("[name=benchmark]", "mgsm")
    assert tab.locator("#prompts > details").count() == 0 and tab.locator("#prompts .words").first.is_visible()


@pytest.mark.parametrize("code", TEXT)
def test_responses_have_their_language_and_direction(tab, code):
    tab.select_option("[name=benchmark]", "mgsm")
    tab.select_option("[name=language]", code)
    block = tab.locator("#prompts .side .words").first
    assert TEXT[code] in block.text_content() and block.get_attribute("lang") == code
    style = block.evaluate("e => [getComputedStyle(e).direction, getComputedStyle(e).unicodeBidi]")
    assert style == ["rtl" if code == "ar" else "ltr", "isolate"]


def test_hostile_responses_are_shown_and_do_nothing(tab):
    tab.select_option("[name=benchmark]", "queries")
    assert shown(tab) == len(HOSTILE)
    text = tab.locator("#responses").inner_text()
    assert not ACTING.search(text)
    for seen in ("<script>alert(1)</script>", '</script><img src="https://example.invalid/x.png"', "{{ 7 * 7 }}"):
        assert seen in text
    for symbol in ("␛", "␀", "␇", "U+202E", "U+2066", "U+009B", "U+D83D", "U+E0068", "U+2028"):
        assert symbol in text
    assert tab.locator("script").count() == 2 and tab.locator("img, iframe, #prompts a, #prompts b").count() == 0
    rows = tab.locator("[name=row] option")
    for index in range(rows.count()):  # the same texts as tokens
        tab.select_option("[name=row]", str(index))
    assert tab.locator("script").count() == 2 and tab.locator("img").count() == 0


def test_a_long_response_waits_for_a_click(tab):
    tab.fill("[name=search]", "long word")
    expect(tab.locator("#found")).to_have_text(re.compile("^1 of"))
    side = tab.locator("#prompts .side").first
    assert len(side.locator(".words").text_content()) < 2100
    button = side.get_by_role("button", name=re.compile("Show all [0-9,]+ characters"))
    length = int(re.sub(r"\D", "", button.text_content()))
    assert length >= 100_000
    button.click()
    assert len(side.locator(".words").text_content()) == length and button.count() == 0


def test_tokens_tell_their_weights(tab, run):
    rows = collect.workdir(run).completions
    index = next(i for i, row in enumerate(rows) if row["harmful"] is False and row["language"] == "ar")
    row = rows[index]
    tab.select_option("[name=row]", str(index))
    spans, tip = tab.locator("#completion .token"), tab.locator("#tip")
    assert spans.count() == len(row["tokens"]) and not tip.is_visible()

    def told(i: int) -> None:
        lines = dict(line.split(": ") for line in tip.inner_text().splitlines())
        assert float(lines["w_T, teacher"]) == pytest.approx(row["w_T"][i], rel=5e-3)
        assert float(lines["w_S, student"]) == pytest.approx(row["w_S"][i], rel=5e-3)
        assert float(lines["KL"]) == pytest.approx(row["kl"][i], rel=5e-3)
        assert float(lines["weight"]) == pytest.approx(row["weight"][i], rel=5e-3)

    spans.nth(2).hover()
    told(2)
    spans.first.focus()
    told(0)
    tab.keyboard.press("ArrowLeft")  # onwards, from right to left
    told(1)
    tab.keyboard.press("End")
    told(len(row["tokens"]) - 1)
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    shares = spans.evaluate_all("nodes => nodes.map(n => Number(n.style.getPropertyValue('--w')))")
    np.testing.assert_allclose(shares, np.array(row["weight"]) / max(row["weight"]), rtol=1e-6)
    tab.select_option("[name=measure]", "kl")
    shares = spans.evaluate_all("nodes => nodes.map(n => Number(n.style.getPropertyValue('--w')))")
    np.testing.assert_allclose(shares, np.array(row["kl"]) / max(row["kl"]), rtol=1e-6)


def test_tokens_of_harmful_prompts_are_folded(tab, run):
    index = next(i for i, row in enumerate(collect.workdir(run).completions) if row["harmful"])
    tab.select_option("[name=row]", str(index))
    assert tab.locator("#completion .token").count() == 0
    tab.locator("#completion summary").first.click()
    expect(tab.locator("#completion .token")).not_to_have_count(0)


def test_curves_are_read_with_the_keyboard_and_the_pointer(tab, run):
    rows = collect.workdir(run).metrics
    figure = tab.locator("[data-curve=kl]")
    figure.focus()
    tab.keyboard.press("ArrowLeft")
    step, value = re.fullmatch(r"step (\d+): ([\d.]+)", figure.locator("output").text_content()).groups()
    assert int(step) == rows[-2]["step"] and float(value) == pytest.approx(rows[-2]["kl"], rel=5e-3)
    svg = tab.locator("[data-curve=loss] svg")
    box = svg.bounding_box()
    svg.hover(position={"x": box["width"] * 46 / 360, "y": box["height"] / 2})  # the plot's left edge
    assert re.fullmatch(r"step 1: [\d.]+", tab.locator("[data-curve=loss] output").text_content())


def test_numbers_in_the_heat_map_are_those_measured(tab, run):
    after = collect.workdir(run).after.summary["multijail"]["languages"]
    table = tab.locator(".heatmap", has_text="multijail")
    for code, entry in after.items():
        row = table.locator("tr", has=tab.locator(f"xpath=.//span[@class='code'][text()='{code}']"))
        cell, low_high = row.locator("td").nth(1), [round(100 * end) for end in entry["asr_interval"]]
        assert int(cell.locator("b").text_content()) == pytest.approx(100 * entry["asr"], abs=0.51)
        assert cell.locator(".range").text_content() == "[{}, {}]".format(*low_high)
        assert row.locator("td").last.text_content() == str(entry["asr_n"])
    width = tab.locator(".heatmaps").evaluate("e => e.clientWidth")
    filled = sum(map(float, tab.locator(".heatmap").evaluate_all("nodes => nodes.map(n => n.offsetWidth)")))
    assert filled > 0.9 * width


def test_every_rate_of_every_language_is_in_a_table(tab, run):
    files = collect.workdir(run)
    before, after = (evaluation.summary["multijail"]["languages"]["sw"] for evaluation in (files.before, files.after))
    rows = tab.locator("#languages h3", has_text="multijail").locator("xpath=following-sibling::table[1]//tr")
    [row] = rows.filter(has=tab.locator("xpath=.//span[@class='code'][text()='sw']")).all()
    for key, name in (("asr", "attack success"), ("refused", "refused"), ("invalid", "invalid")):
        text = row.locator(f"[data-label='{name}']").text_content()
        assert text.startswith(f"{before[key]:.1%} → {after[key]:.1%}[") and f" n {after[key + '_n']}" in text
    assert "p\u00a0<\u00a0.001" in row.locator("[data-label='attack success']").text_content().replace("0.001", ".001")


def test_what_changed_comes_first_and_the_worse_before_the_better(tab, run):
    changes = tab.evaluate("data.prompts.map(p => p.change)")
    order = [list(dict.fromkeys(changes))[i] for i in range(3)]
    assert order == ["worse", "other", "better"]
    assert changes == sorted(changes, key=[*order, "same", ""].index)  # each but once


def test_terms_are_explained_where_they_stand(tab):
    for curve, words in {
        "loss": "may rise while the divergence falls",
        "w_T": "teacher's confidence",
        "w_S": "risk to disagree",
        "skipped": "nothing was updated",
        "stopped": "cut at",
    }.items():
        assert words in tab.locator(f"[data-curve={curve}] figcaption").text_content()
    titles = tab.locator("[data-curve] figcaption b").all_text_contents()
    assert titles[0].startswith("divergence") and titles[1] == "loss"


@pytest.mark.parametrize("kind", ["no evaluation", "evaluation only"])
def test_pages_of_partial_runs_work(open_page, make, kind):
    workdir = make.run(n=4)
    out = make.directory / "out"
    if kind == "no evaluation":
        shutil.rmtree(workdir / "eval")
        report.write(workdir, out)
    else:
        report.write_evaluations([workdir / "eval" / "60"], out)
    tab = open_page(out / "report.html", "phone")
    assert tab.locator("#training").count() == (kind == "no evaluation")
    assert tab.locator("#responses").count() == (kind == "evaluation only")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_says_how_much_of_a_large_evaluation_it_shows(make, monkeypatch):
    results = Results(collect.workdir(make.run(n=10)))
    monkeypatch.setattr(page, "MOST_PROMPTS", 50)
    html = page.html(results)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    assert len(data["prompts"]) == 50 and f"50 of {len(results.pairs)} are here: what" in html
    assert len({(p["benchmark"], p["pass"], p["language"], p["id"]) for p in data["prompts"]}) == 50
