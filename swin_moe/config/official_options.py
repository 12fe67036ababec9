"""Options of the official scripts' command line, and what takes their place: everything here is key=value.

Facts: official repository at f82860b, parse_option of main.py, main_moe.py, main_simmim_pt.py and main_simmim_ft.py.
"""

import difflib

_KERNELS = "leave it out: fast kernels are used where they are built"
INSTEAD = {
    "--cfg": "the config comes first, without a word before it: swin-moe train FILE key=value ...",
    "--opts": "options are key=value words with our keys: TRAIN.BASE_LR 1e-3 is optim.lr=1e-3",
    "--batch-size": "use data.global_batch=N (images of a step over all ranks)",
    "--data-path": "use data.path=FOLDER",
    "--zip": "use data.name=zip",
    "--cache-mode": "leave it out: samples are drawn in one global order, so no rank owns a part to keep in memory; "
    "files that were read stay in the operating system's cache",
    "--pretrained": "use checkpoint.init=FILE",
    "--resume": "use checkpoint.load=PATH",
    "--accumulation-steps": "use data.global_batch=N and data.micro_batch=N, from which accumulation follows",
    "--use-checkpoint": "use parallel.recompute=block",
    "--disable_amp": "use engine.precision=fp32",
    "--enable-amp": "use engine.precision=fp16",
    "--amp-opt-level": "use engine.precision=fp16 or fp32",
    "--output": "use run.output=FOLDER",
    "--tag": "use run.name=NAME",
    "--eval": "use swin-moe evaluate CONFIG checkpoint.load=PATH",
    "--throughput": "use swin-moe throughput CONFIG",
    "--local_rank": "ranks are the launcher's: swin-moe launch -n N -- -m swin_moe.train CONFIG",
    "--fused_window_process": _KERNELS,
    "--fused_layernorm": _KERNELS,
    "--optim": "use optim.name=adamw or sgd",
}


def refusal(word: str) -> str:
    """Returns the sentence about a word of the command line that begins with a dash."""
    name = word.partition("=")[0]
    known = {key.replace("_", "-"): key for key in INSTEAD}
    if (key := known.get(name.replace("_", "-"))) is not None:
        return f"{name} is an option of the official scripts; {INSTEAD[key]}"
    near = difflib.get_close_matches(name, INSTEAD, n=1)
    meant = f"; did you mean the official scripts' {near[0]}? Here: {INSTEAD[near[0]]}" if near else ""
    return f"unknown option {name!r}: options are key=value words, such as optim.lr=1e-3{meant}"
