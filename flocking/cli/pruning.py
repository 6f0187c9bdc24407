"""What ``flocking prune`` does: from a model and texts to a smaller model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import flocking
from flocking.cli.options import at_least_one, load, read
from flocking.cli.outputs import refuse_nothing
from flocking.texts import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flocking.pruning import Exported

_GGUF = ".gguf"
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
        """Whether a GGUF file is wanted."""
        return self.output.suffix.lower() == _GGUF

    def check(self) -> None:
        """Refuse what needs no model to be refused."""
        from flocking.analysis import kept_count
        from flocking.artifacts import refuse_unwritable
        from flocking.pruning import FIXED, refuse_existing
        from flocking.recording import check_numbers

        refuse_nothing("output", self.output)
        check_numbers(seed=self.seed)
        at_least_one(self.multiple, "--keep-multiple")
        kept_count(self.density, 2**62)  # in range; whether a neuron is left, the model says
        if self.method not in FIXED:
            raise ValueError(f"--method {self.method}: choose from {', '.join(FIXED)}.")
        if self.own_samples and self.method != "static":
            reads = "no texts" if self.method == "magnitude" else "texts and own samples both"
            raise ValueError(
                f"--own-samples: {self.method} reads {reads}: leave --own-samples out, or give "
                "--method static."
            )
        self._check_gguf()
        if os.path.lexists(self.output):
            place, how = self.output, "pass --overwrite"
            refuse_existing(place, place, self.overwrite, self.source, how=how)
        refuse_unwritable(self.output)

    def _check_gguf(self) -> None:
        from flocking.pruning import type_of_down

        if self.is_gguf:
            self.gguf()
            type_of_down(self.down_type)
            if self.multiple is not None and self.multiple % _MULTIPLE:
                raise ValueError(
                    f"--keep-multiple {self.multiple}: widths in a GGUF file are multiples of "
                    f"{_MULTIPLE}: give one of those."
                )
        elif self.down is not None:
            raise ValueError(
                f"--down {self.down}: {self.output} is a folder, and this is of GGUF files: leave "
                "it out, or give an --output that ends in .gguf."
            )

    @property
    def down_type(self) -> str:
        """Type of the down-projections in a GGUF file."""
        return self.down or "Q8_0"

    def gguf(self) -> Path:
        """The GGUF file that a pruned one is made from."""
        from flocking.models import embedded_file

        file = embedded_file() if self.source is None else expanded(Path(self.source))
        if file is None or not (file.is_file() or file.suffix.lower() == _GGUF):
            raise ValueError(
                f"--output {self.output}: a GGUF file is made from a GGUF file: give one as "
                "SOURCE, or name a folder, which llama.cpp's convert_hf_to_gguf.py converts."
            )
        return file


def write_pruned(request: Request) -> Exported:
    """Write the smaller model; how small it is, and what it loses on held-out texts."""
    from flocking.pruning import fixed_selection, split_texts

    request.check()
    texts = texts_of(request.texts)
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
    if request.is_gguf:
        return _as_gguf(request, model, tokenizer, selection, held_out)
    return flocking.export(
        model,
        selection,
        request.output,
        tokenizer=tokenizer,
        held_out=held_out,
        overwrite=request.overwrite,
    )


def _as_gguf(
    request: Request,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    selection: object,
    held_out: list[list[int]],
) -> Exported:
    """A GGUF file; what it loses is that of the file's own weights, read again."""
    from flocking.models import read_gguf
    from flocking.pruning import measure_lost

    done = flocking.export_gguf(
        request.gguf(),
        selection,
        request.output,
        down=request.down_type,
        overwrite=request.overwrite,
    )
    written = read_gguf(done.path)
    return replace(done, lost=measure_lost(model, written, held_out, tokenizer=tokenizer))


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
