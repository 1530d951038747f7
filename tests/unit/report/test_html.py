"""The report as a whole: what is on the page, what is left out when something is gone, and how a real browser shows it."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from page_reader import Page
from report_runs import PHASES, make_config, make_run, write_history

from dtl.report import make_comparison, make_report
from dtl.report.html import Cell, Table
from dtl.report.html import page as page_of

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
no_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: install one with `apt-get install chromium`")
NASTY = '<script>alert("$x")</script>&amp; a name that is very long and has_no_spaces_anywhere_in_it_to_break_the_line_at'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A run with its report, made once."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DTL_CACHE", str(folder / "cache"))
        run = make_run(folder / "digits")
        (run / "transfer.json").write_text(
            json.dumps({
                "source": "mobilenet.pt", "by": "order", "coverage": 0.951, "warnings": [], "notes": ["a <b>note</b>"],
                "totals": {"fresh": {"tensors": 2, "parameters": 970}, "loaded (shape)": {"tensors": 40, "parameters": 12345}},
                "lines": ["warning: besides the head 1 tensor stays random", "note: a <b>note</b>"],
                "table": [["fresh", "features.2.{weight,bias}", NASTY, "2", "no source"]],
            })
        )  # fmt: skip
        said: list[str] = []
        page = make_report(run, log=said.append)
        yield SimpleNamespace(path=run, page=page, said=said)


def test_the_page_has_every_part_and_needs_nothing_else(run: SimpleNamespace) -> None:
    assert run.page == run.path / "report/index.html"
    page = Page.read(run.page)
    page.check_self_contained()
    for heading in ("Phases", "Training curves", "What the network sees", "Predictions", "Classes", "Pretrained weights", "Settings"):
        assert heading in page.text
    assert "Left out" not in page.text
    assert run.said == []
    assert "digits (1,437 images of 10 classes)" in page.text
    assert "95.1 %" in page.text
    assert "12,345" in page.text
    assert "a <b>note</b>" in page.text
    for words in ("warning: besides the head 1 tensor stays random", "features.2.{weight,bias}", "no source"):
        assert words in page.text  # as in the terminal
    assert "The model was evaluated on all 360 validation images" in page.text
    names = {file.name for file in run.page.parent.iterdir()}
    pictures = {
        "curves",
        "curves-narrow",
        "training-pretext",
        "training-head",
        "training-all",
        "predictions",
        "mistakes",
        "confusion",
        "classes",
    }
    assert names == {"index.html", *(f"{name}.png" for name in pictures)}


def test_right_and_wrong_are_told_by_mark_and_words_too(run: SimpleNamespace) -> None:
    page = Page.read(run.page)
    assert any(image["alt"].startswith("wrong: ") and ", true: " in image["alt"] for image in page.images)
    assert "✗" in page.text


@no_browser
@pytest.mark.parametrize("width", [375, 1280])
def test_a_real_browser_shows_it(run: SimpleNamespace, tmp_path: Path, width: int) -> None:
    found = measured(run.page.read_text(encoding="utf-8"), width, tmp_path)
    assert found["scroll"] == found["width"] <= width
    assert found["images"] == len(Page.read(run.page).images)
    assert found["broken"] == 0
    assert found["narrow"] == (1 if width < 640 else 0)  # the curves have a drawing of their own there
    for words in ("digits", "Training curves", "What the network sees", "Most often confused", "Pretrained weights", "global_batch_size"):
        assert words in found["text"]


@no_browser
def test_a_comparison_in_a_narrow_window(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, make_config(name, phases={"all": PHASES["all"]}), model=False) for name in ("supervised", "a-" + "long" * 9)]
    found = measured(make_comparison(runs, out=tmp_path / "comparison").read_text(encoding="utf-8"), 375, tmp_path)
    assert found["scroll"] == found["width"]
    assert (found["images"], found["broken"], found["narrow"]) == (1, 0, 1)
    for words in ("Curves", "Results", "best top-1", "supervised", "a-" + "long" * 9):
        assert words in found["text"]


@no_browser
def test_numbers_beside_long_names_stay_on_one_line_in_a_narrow_window(tmp_path: Path) -> None:
    names = ("hard-leaved pocket orchid", "pink-yellow dahlia", "a_name_without_a_single_space_in_it_at_all")
    rows = [[Cell(one), Cell(other), Cell("12", number=True), Cell("1,234", number=True)] for one in names for other in names]
    table = Table(["true class", "predicted as", "images", "of"], rows, compact=True)
    found = measured(page_of("names", [], [table], footer=""), 375, tmp_path)
    assert found["numbers"] == 2 * len(rows) + 2
    assert found["cut"] == []
    assert found["scroll"] == found["width"]


def measured(document: str, width: int, folder: Path) -> dict[str, Any]:
    """What a browser makes of a page in a frame of that width: a window cannot be made so narrow everywhere. A frame with
    `srcdoc` may be measured from outside. Fails where the console has a line."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"""<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><title>wrapper</title><body>
<pre id="found"></pre><iframe id="frame" width="{width}" height="900" srcdoc="{html.escape(document)}"></iframe>
<script>
const lines = cell => {{
  const range = cell.ownerDocument.createRange();
  range.selectNodeContents(cell);
  return range.getClientRects().length;
}};
onload = () => {{  // of the whole: the frame and its images are there
  const page = frame.contentDocument, images = [...page.images], numbers = [...page.querySelectorAll(".compact .n")];
  page.querySelectorAll("details").forEach(part => part.open = true);
  found.textContent = JSON.stringify({{
    width: page.documentElement.clientWidth, scroll: page.documentElement.scrollWidth, images: images.length,
    broken: images.filter(image => !image.naturalWidth).length, text: page.body.innerText,
    narrow: images.filter(image => image.currentSrc != image.src).length,
    numbers: numbers.length, cut: numbers.filter(cell => lines(cell) > 1).map(cell => cell.innerText),
  }});
}};
</script>""")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", f"file://{wrapper}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
    found: dict[str, Any] = json.loads(html.unescape(shown.stdout.split('<pre id="found">')[1].split("</pre>")[0]))
    return found


def test_a_run_without_its_parts_says_what_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_config("run", train=str(tmp_path / "gone")), model=False)
    said: list[str] = []
    page = Page.read(make_report(run, log=said.append))
    page.check_self_contained()
    assert "Training curves" in page.text
    assert "Left out" in page.text
    assert "no model folder" in page.text
    assert str(tmp_path / "gone") in page.text
    assert len(said) == 2
    (run / "history.jsonl").unlink()
    (run / "config.yaml").unlink()
    (run / "model").mkdir()
    page = Page.read(make_report(run))
    page.check_self_contained()
    assert "no history.jsonl" in page.text
    assert "no config.yaml" in page.text
    assert not (run / "report/curves.png").exists()  # of the report before


def test_other_data_than_the_run_had_is_not_shown_as_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = run / "model/model.json"
    facts = json.loads(file.read_text())
    facts["made_by"]["data"] = "another"
    file.write_text(json.dumps(facts))
    page = Page.read(make_report(run))
    assert "is no longer the data that the run was trained on" in page.text
    assert "What the network sees" not in page.text


def test_a_model_that_fails_costs_its_part_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "model/model.safetensors").write_bytes(b"torn")
    page = Page.read(make_report(run))
    assert "What the network sees" in page.text
    assert "model.safetensors are damaged" in page.text


def test_a_run_that_ends_with_the_pretext_task_is_asked_about_rotations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_config("run", phases={"pretext": PHASES["pretext"]}))
    page = Page.read(make_report(run, max_images=40))
    assert "Left out" not in page.text
    assert "40 of 360 validation images, drawn at random, each in four rotations" in page.text
    assert "270°" in page.text


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "photos"
    for number, name in enumerate((NASTY.replace("/", "∕"), "$5_bills^{", "日本")):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(10 * number + i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    config = make_config("evil <b>&", train=str(folder), val=str(folder), global_batch_size=6)
    run = make_run(tmp_path / "evil <b>&", config, model=False)
    page = Page.read(make_report(run))
    page.check_self_contained()
    assert "alert(" in page.text
    assert "日本" in page.text
    assert (run / "report/training-pretext.png").exists()


def test_a_comparison_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        make_run(tmp_path / f"runs/rotnet-s{seed}", make_config(f"rotnet-s{seed}", seed=seed), model=False)
    make_run(tmp_path / "runs/supervised", make_config("supervised", phases={"all": PHASES["all"]}), model=False)
    folders = sorted((tmp_path / "runs").iterdir())
    (tmp_path / "runs/typo").mkdir()
    (tmp_path / "runs/typo/status.json").write_text('{"state": "failed", "why": "input: phtos does not exist"}')
    told: list[str] = []
    path = make_comparison([*folders, tmp_path / "runs/typo"], log=told.append)
    assert path == Path("comparison/index.html")
    assert f"left out of the comparison: {tmp_path}/runs/typo: its start failed before the first step (input: phtos does not exist)" in told
    assert make_comparison(folders) == path, "the same command again"
    page = Page.read(path)
    page.check_self_contained()
    for words in ("rotnet · supervised", "90.05 % (90.00 to 90.10)", "phases.pretext", "mean and range of 2 seeds", "Left out"):
        assert words in page.text
    write_history(folders[2], [])
    assert "supervised has no evaluation" in Page.read(make_comparison(folders, out=tmp_path / "again")).text


def test_help_and_comparisons_need_no_torch(tmp_path: Path) -> None:
    code = "import sys; from dtl.commands.report import run\ntry: run(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "--help"], check=True, capture_output=True, timeout=60)
    runs = [str(make_run(tmp_path / name, make_config(name, phases={"all": PHASES["all"]}), model=False)) for name in ("a", "b")]
    done = subprocess.run([sys.executable, "-c", code, *runs], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "comparison/index.html"
