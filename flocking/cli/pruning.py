"""What ``flocking prune`` does: from a model and texts to a smaller model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

import flocking
from flocking.cli.options import at_least_one, load, read
from flocking.cli.outputs import refuse_nothing
from flocking.cli.printing import add_row, say
from flocking.texts import expanded

if TYPE_CHECKING:
    from flocking.pruning import Exported, Lost

GGUF = ".gguf"
_MULTIPLE = 32  # neurons in a GGUF file: a block of the types that down-projections have there


@dataclass(frozen=True)
class Request:
    """What the user asked for; names are those of the command's options."""

    source: str | None
    output: Path
    texts: list[str] | None
    own_samples: bool
    density: float
    method: str
    multiple: int | None
    down: str | None
    seed: int
    device: str | None
    dtype: str | None
    overwrite: bool

    @property
    def is_gguf(self) -> bool:
        """Whether the output is a GGUF file."""
        return self.output.suffix.lower() == GGUF

    def check(self) -> None:
        """Refuse what needs no model to be refused."""
        from flocking.analysis import kept_count
        from flocking.pruning import DOWN_TYPES, FIXED
        from flocking.recording import check_numbers

        refuse_nothing("output", self.output)
        check_numbers(seed=self.seed)
        at_least_one(self.multiple, "--keep-multiple")
        kept_count(self.density, 2**62)  # in range; whether any neuron is left, the model says
        if self.method not in FIXED:
            raise ValueError(f"--method {self.method}: choose from {', '.join(FIXED)}.")
        if self.own_samples and self.method == "magnitude":
            raise ValueError("--own-samples: magnitude needs no texts: leave out one of them.")
        if self.down is not None and not self.is_gguf:
            raise ValueError(
                f"--down {self.down}: of GGUF files, and {self.output} is a folder: leave it out, "
                "or give an --output that ends in .gguf."
            )
        if self.down is not None and self.down not in DOWN_TYPES:
            raise ValueError(f"--down {self.down}: choose from {', '.join(DOWN_TYPES)}.")
        if self.is_gguf and self.multiple is not None and self.multiple % _MULTIPLE:
            raise ValueError(
                f"--keep-multiple {self.multiple}: widths in a GGUF file are multiples of "
                f"{_MULTIPLE}: give one of those."
            )


def write_pruned(request: Request) -> Exported:
    """Write the smaller model; what it was made of, and what it loses on held-out texts."""
    from flocking.models import embedded_gguf
    from flocking.pruning import check_export, fixed_selection, split_texts

    request.check()
    gguf = _gguf_of(request)
    texts = texts_of(request.texts)
    check_export(request.output, request.overwrite)
    model, tokenizer = load(request.source, request.device, request.dtype)
    calibration, held_out = split_texts(model, texts, tokenizer)
    selection = fixed_selection(
        model,
        tokenizer,
        request.method,
        None if request.own_samples else calibration,
        request.density,
        multiple=request.multiple or (_MULTIPLE if request.is_gguf else 1),
        seed=request.seed,
    )
    if gguf is None:
        return flocking.export(
            model,
            selection,
            request.output,
            tokenizer=tokenizer,
            held_out=held_out,
            overwrite=request.overwrite,
        )
    done = flocking.export_gguf(
        gguf,
        selection,
        request.output,
        down=request.down or "Q8_0",
        overwrite=request.overwrite,
    )
    written, _ = dequantised(done.path)
    return replace(done, lost=measure_lost(model, written, held_out))


def texts_of(names: Sequence[str] | None) -> list[str]:
    """Texts of files, folders of .txt files and standard input; without any, the packaged ones."""
    from flocking.pruning import calibration_texts

    if not names:
        return calibration_texts()
    if list(names).count("-") > 1:
        raise ValueError("- stands for standard input, which can be read once: name it once.")
    found: list[str] = []
    for name in names:
        is_folder = name not in ("", "-") and expanded(Path(name)).is_dir()
        found += calibration_texts(name) if is_folder else [read(name)]
    return found
