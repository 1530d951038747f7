"""An address with a password and a token, wherever it stands in a command line: no command repeats the secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_folders import model_folder, write_image

from dtl import cli
from dtl.commands import COMMANDS

ADDRESS = "http://bob:hunter2secret@127.0.0.1:9/x.tar?token=tokensecret99"
LINES = """
predict M {}; predict {} a.jpg; predict M a.jpg --out {}; predict M list.txt
evaluate {}; evaluate M --data.val {} --data.retries 0; evaluate M --json {}; evaluate M --device {}
evaluate M --data.val photos --by-group --group-regex {}; predict M photos --group-regex {}; evaluate M --split {}
calibrate {}; calibrate M --data.val {} --data.retries 0; calibrate M --data.val photos --data.test {}; calibrate M --data.val photos --json {}
calibrate M --threshold {}
report {}; report M --out {}; report M --csv {}
export {} --to onnx --out x.onnx; export M --to onnx --out {}; export M --to safetensors --out x.safetensors --images {}
average {} M --out x; average M M2 --out {}
transfer --model dtl/resnet_tiny --source {}; transfer --model {} --source M; transfer --model dtl/resnet_tiny --source M --map {}
convert {} out.safetensors; convert a.jpg {}; convert a.jpg out.safetensors --nothing {}
pack {} out; pack photos {}; pack photos out --classes-from {}; pack photos out --shard-size {}; pack list.txt out --group-column {}
index {} --retries 0 --out out; index a.tar --out {}; index {} {}
verify {} --retries 0; verify M --workers {}; verify M {}
verify-epoch {} --retries 0; verify-epoch photos --cache-dir {}
verify-resume {}; verify-resume --data.workers {}; verify-resume --config {}
find-lr --config {}; find-lr --config finetune --data.train {} --data.retries 0; find-lr --phase {}
train {}; train --config {}; train --run.dir {}; train --run.name {}; train --model.name {}; train --data.workers {}; train --{} x; train --data.cache_dir {}
train --data.names {} --data.train photos; train --data.test {} --data.train photos; train --data.train photos --data.group {}
train --data.train photos --data.group.file {}; train --data.train photos --run.profile {}; train --phases.all.train {} --transfer.source {} --run.seed x
folds --config {}; folds --data.train {} --config finetune --data.retries 0; folds --folds {}; folds --json {}/x
search --space {}; search --config {} --space x; search --space x --budget {}; search --space list.txt --data.train {}
audit {}; audit photos --weights {}; audit photos --model {}; audit photos --fail-on {}; audit list.txt --data.retries 0
explain {} a.jpg; explain M {}; explain M list.txt --out {}
models {}; completion {}; doctor {}; doctor --run-dir {} --quick; doctor --workers {}; doctor --config {}
{}; --{}
"""
CASES = [line.strip() for line in LINES.replace("\n", ";").split(";") if line.strip()]


def test_every_command_is_tried() -> None:
    assert {case.split()[0] for case in CASES} >= set(COMMANDS)


@pytest.mark.parametrize("case", CASES)
def test_no_command_repeats_the_secrets_of_an_address(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "M"), model_folder(tmp_path / "M2")
    write_image(tmp_path / "a.jpg", 1), write_image(tmp_path / "photos/one/b.jpg", 2)
    (tmp_path / "list.txt").write_text(ADDRESS + "\n")
    try:
        status = cli.main(case.format(*[ADDRESS] * 3).split())
    except SystemExit as ended:  # argparse's own way to end
        status = ended.code  # type: ignore[assignment]
    shown = "".join(capfd.readouterr())
    assert status == (0 if case.startswith("models") else 2), shown
    assert "secret" not in shown, shown
    assert "bob" not in shown, shown
    assert [path.name for path in tmp_path.rglob("*") if "secret" in path.name] == []


def test_python_repeats_none_either(tmp_path: Path) -> None:
    import dtl

    recipe = {"model": {"name": ADDRESS}, "phases": {"all": {"train": "all"}}}
    for call in (lambda: dtl.predict(ADDRESS, "a.jpg"), lambda: dtl.fit(recipe), lambda: dtl.fit(ADDRESS), lambda: dtl.predict(Path(ADDRESS), "a.jpg"),
                 lambda: dtl.export(ADDRESS, "x"), lambda: dtl.evaluate(Path(ADDRESS))):  # fmt: skip
        with pytest.raises(dtl.UserError) as caught:
            call()
        assert "secret" not in str(caught.value)
