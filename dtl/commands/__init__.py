"""The commands of `dtl`, one module each: `run(arguments) -> int`, and a `--help` that imports no torch."""

COMMANDS = {
    "train": "train or fine-tune, in phases, on one process or many",
    "pack": "pack images into shards, once",
    "transfer": "show what a transfer of pretrained weights would load (a dry run)",
    "models": "list the networks that can be named",
    "evaluate": "exact metrics of a run or model folder on a validation set",
    "predict": "class names and probabilities for images, to CSV or JSON lines",
    "export": "a model folder as ONNX, torch.export or safetensors, checked against PyTorch",
    "average": "the mean of several runs' weights, as a model folder",
    "report": "curves, confusion, example images of one run or several, as PNG and HTML",
    "index": "manifest and index for WebDataset tars made by others",
    "verify": "check packed shards: sizes, checksums, every image decoded",
    "verify-resume": "kill a recipe at random moments, and compare with an undisturbed run",
    "verify-epoch": "prove an epoch: count and hash what the loaders of any world size deliver",
    "find-lr": "a learning rate range test of a phase, on one process or many, with a plot and a suggestion",
    "completion": "a script for bash, zsh or fish that completes commands and options",
    "doctor": "what would go wrong on this machine, each finding with its fix",
}
