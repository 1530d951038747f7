"""`dtl predict`: right pixels, right names, one order, and every unreadable image told."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import CLASSES, model_folder, write_image
from PIL import Image

from dtl.commands.predict import run
from dtl.data.packing.pack import pack
from dtl.errors import UserError
from dtl.inference.model import open_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(("b/2.jpg", "b/10.JPG", "a/deep/x.jpg", "c.jpg", "a/1, two.jpg")):
        write_image(tmp_path / "photos" / name, number, size=(17 + 3 * number, 30))
    return tmp_path / "photos"


def predicted(model: Path, *arguments: object, out: str = "out.csv") -> list[dict[str, Any]]:
    """The rows that the command writes."""
    file = next((Path(str(one)) for one in arguments if str(one).startswith("/")), Path()).parent / out
    assert run([str(model), *map(str, arguments), "--out", str(file), "--workers", "0", "--precision", "no"]) == 0
    text = file.read_text()
    return [json.loads(line) for line in text.splitlines()] if out.endswith("jsonl") else list(csv.DictReader(io.StringIO(text)))


def by_hand(model: Path, path: Path) -> torch.Tensor:
    """Probabilities [K] with Pillow's own resize: the short side to 20, the central 16 x 16."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((20 * width // short, 20 * height // short), Image.Resampling.BILINEAR)
    left, top = round((image.width - 16) / 2), round((image.height - 16) / 2)
    pixels = torch.tensor(list(image.crop((left, top, left + 16, top + 16)).tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]))
    with torch.no_grad():
        return open_model(model).network.module(((pixels - mean) / std)[None]).softmax(dim=1)[0]


def test_a_folder_in_sorted_order_with_the_networks_probabilities(model: Path, photos: Path) -> None:
    rows = predicted(model, photos)
    assert list(rows[0]) == ["path", "label", "name", "probability"]
    assert [row["path"] for row in rows] == sorted(str(path) for path in photos.rglob("*.[jJ]*"))
    for row in rows:
        probabilities = by_hand(model, Path(row["path"]))
        # Pillow and torch round single pixels differently.
        assert float(row["probability"]) == pytest.approx(probabilities.max().item(), abs=0.02)
        assert row["label"] == CLASSES[int(probabilities.argmax())]
        assert row["name"] == {"ant": "Ant, the small one"}.get(row["label"], row["label"])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_change_nothing(model: Path, photos: Path, batch_size: int) -> None:
    rows, others = predicted(model, photos), predicted(model, photos, "--batch-size", batch_size, out="other.csv")
    for row, other in zip(rows, others, strict=True):
        assert {**row, "probability": ""} == {**other, "probability": ""}
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=2e-6)


def test_top_in_json_lines_is_a_list_that_adds_up(model: Path, photos: Path) -> None:
    for row in predicted(model, photos, "--top", 9, out="out.jsonl"):
        assert {one["label"] for one in row["predictions"]} == set(CLASSES)
        values = [one["probability"] for one in row["predictions"]]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert row["predictions"][0] == {key: row[key] for key in ("label", "name", "probability")}
    assert "predictions" not in predicted(model, photos, out="one.jsonl")[0]


def test_files_and_lists_keep_their_order(model: Path, photos: Path) -> None:
    named = [photos / "c.jpg", photos / "a/1, two.jpg", photos / "b/2.jpg"]
    assert [row["path"] for row in predicted(model, *named)] == [str(path) for path in named]
    (photos / "plain.txt").write_text("c.jpg\na/1, two.jpg\nb/2.jpg\n")
    (photos / "labelled.txt").write_text("c.jpg bee\na/1, two.jpg 2\nb/2.jpg\tcat\n")
    (photos / "table.csv").write_text('label,path\nbee,c.jpg\ncat,"a/1, two.jpg"\nant,b/2.jpg\n')
    for name in ("plain.txt", "labelled.txt", "table.csv"):
        assert [row["path"] for row in predicted(model, photos / name)] == [str(path) for path in named]


def test_a_list_from_stdin_to_stdout(model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos}/c.jpg\n{photos}/b/2.jpg\n"))
    assert run([str(model), "-", "--out", "-", "--workers", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "path,label,name,probability"
    assert [line.split(",")[0] for line in captured.out.splitlines()[1:]] == [f"{photos}/c.jpg", f"{photos}/b/2.jpg"]
    assert "2 images predicted" in captured.err


def test_packed_shards_give_what_their_images_give(model: Path, tmp_path: Path) -> None:
    for number in range(6):
        write_image(tmp_path / f"photos/{'xy'[number % 2]}/{number}.jpg", number)
    pack(tmp_path / "photos", tmp_path / "shards", progress=False, processes=1)
    loose, packed = predicted(model, tmp_path / "photos"), predicted(model, tmp_path / "shards", out="packed.csv")
    assert [{**row, "path": str(tmp_path / "photos" / row["path"])} for row in packed] == loose


def test_unreadable_images_are_listed_and_not_fatal(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = predicted(model, photos)
    (photos / "a/empty.png").touch()
    (photos / "a/text.jpg").write_text("no image")
    (photos / "cut.jpg").write_bytes((photos / "c.jpg").read_bytes()[:400])
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    capsys.readouterr()
    assert predicted(model, photos) == whole
    told = capsys.readouterr().err
    for name, reason in (("a/empty.png", "0 bytes"), ("a/text.jpg", "text"), ("cut.jpg", "Truncated"), ("gone.jpg", "No such file")):
        (line,) = (line for line in told.splitlines() if f"{photos}/{name}:" in line)
        assert reason in line
    assert "5 images predicted, 4 could not be read" in told


def test_nothing_readable_is_an_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match="the image could not be read"):
        run([str(model), str(tmp_path / "a.jpg"), "--out", str(tmp_path / "o.csv"), "--workers", "0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "{tmp}", "--out", "{tmp}/o.csv"], "holds no images"),
        (["{model}", "{tmp}/none.jpg", "--out", "{tmp}/o.csv"], "does not exist"),
        (["{model}", "{tmp}/x.tar", "--out", "{tmp}/o.csv"], "manifest.json"),
        (["{model}", "{tmp}/data.bin", "--out", "{tmp}/o.csv"], "neither an image nor a list"),
        (["{model}", "{tmp}/notes.txt", "--out", "{tmp}/o.csv"], "notes.txt is neither an image nor a list of images: .* .the first is 'Dear diary, today I"),
        (["{model}", "{tmp}", "--out", "{tmp}/o.txt"], "use .csv or .jsonl"),
        (["{model}", "{tmp}", "--out", "{tmp}/no/o.csv"], "does not exist"),
        (["{model}", "{tmp}", "--out", "{tmp}/o.csv", "--top", "3"], "CSV has one line per image"),
        (["{tmp}", "{tmp}", "--out", "{tmp}/o.csv"], "neither a run nor a model folder"),
        (["{tmp}/nothing", "{tmp}", "--out", "{tmp}/o.csv"], "does not exist"),
    ],
)
def test_mistakes_are_one_clear_line(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "x.tar").touch()
    (tmp_path / "notes.txt").write_text("\n Dear diary, today I saw ants\nand bees\n")
    (tmp_path / "data.bin").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=message) as caught:
        run([one.format(model=model, tmp=tmp_path) for one in arguments])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("**/o.csv"))


def test_a_full_disk_ends_in_one_line_and_leaves_the_old_file(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "out.csv", Path.open
    out.write_text("old")

    def full(path: Path, *given: Any, **named: Any) -> Any:
        return real(Path("/dev/full") if path.name.startswith(".out.csv") else path, *given, **named)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"^--out .*out\.csv: cannot be written: No space left on device$"):
        run([str(model), str(photos), "--out", str(out), "--workers", "0"])
    assert out.read_text() == "old"
    assert [one.name for one in tmp_path.glob("*out*")] + [one.name for one in tmp_path.glob(".*")] == ["out.csv"]


def test_a_folder_that_cannot_be_written_is_one_line_before_any_image_is_read(model: Path, photos: Path) -> None:
    with pytest.raises(UserError, match=r"^--out /proc/out\.csv: cannot be written: [A-Z][a-z -]+$"):  # not even by root
        run([str(model), str(photos), "--out", "/proc/out.csv"])


def test_too_little_memory_is_told_as_what_it_is(model: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("dtl.inference.images.ImageInputs.pixels", full)
    with pytest.raises(UserError, match="the image could not be read"):
        predicted(model, photos / "c.jpg")
    assert "c.jpg: there is not enough memory to decode it" in capsys.readouterr().err
