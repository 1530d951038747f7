"""`dtl doctor` with a recipe."""

from __future__ import annotations

from pathlib import Path


def test_the_recipe_says_what_is_needed(tmp_path: Path) -> None:
    from dtl.commands.doctor import _parser, _wanted

    file = tmp_path / "mine.yaml"
    data = "data: {image_size: 96, global_batch_size: 32, workers: 5, cache_dir: here}"
    file.write_text(f"{data}\nmodel: {{name: torchvision/resnet50}}\nphases: {{all: {{epochs: 1}}}}\n")
    wanted = _wanted(_parser().parse_args(["--config", str(file)]))
    assert wanted["model"].name == "torchvision/resnet50"
    assert wanted["cache_dir"] == Path("here")
    assert (wanted["need"].image_size, wanted["need"].batch_size, wanted["need"].workers) == (96, 32, 5)
    file.write_text(f"{data}\nphases: {{first: {{epochs: 1, image_size: [128, 96]}}, last: {{epochs: 1}}}}\n")
    assert _wanted(_parser().parse_args(["--config", str(file)]))["need"].image_size == (128, 96), "the largest"
    # As the repository's own recipes are.
    _wanted(_parser().parse_args(["--config", "digits"]))
    _wanted(_parser().parse_args(["--config", "finetune", "--data", "photos"]))
