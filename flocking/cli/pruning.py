"""What ``flocking prune`` does: from a model and texts to a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import flocking
from flocking.cli.options import at_least_one, load
from flocking.cli.outputs import naming, refuse_nothing
from flocking.cli.printing import complain
from flocking.cli.session import is_quiet
from flocking.texts import TextFiles, expanded

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
        from flocking.pruning import FIXED
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
        if self.seed and self.method != "global-local" and not self.own_samples:
            raise ValueError(
                f"--seed {self.seed}: {self.method} draws nothing: leave --seed out, or give "
                "--own-samples or --method global-local, with which the model writes texts."
            )
        self._check_gguf()

    def _check_gguf(self) -> None:
        from flocking.models import contents_of
        from flocking.pruning import blocks_of, type_of_down

        if self.is_gguf:
            type_of_down(self.down_type)
            contents = contents_of(self.gguf())
            blocks_of(contents, str(self.gguf()))  # refuses what cannot be cut
            kinds = {one.kind.name for one in contents.tensors if "ffn_down" in one.name}
            if self.down is not None and kinds <= {"F32", "F16", "BF16"}:
                raise ValueError(
                    f"--down {self.down}: down-projections in {self.gguf()} are not quantised "
                    f"({', '.join(sorted(kinds))}), and are cut without loss: leave it out."
                )
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

    def check_model(self, model: PreTrainedModel, folder: Path) -> None:
        """Refuse what a selection of this density could not be written of, or not there.

        It is written first into something in `folder`.
        """
        from flocking.pruning import refuse_unexportable, refuse_unexportable_gguf

        where = self.density, self.widths
        if self.is_gguf:
            refuse_unexportable_gguf(self.gguf(), *where, self.down_type, self.output, folder)
        else:
            refuse_unexportable(model, *where, self.output, folder)

    def may_replace(self, found: Path) -> None:
        """Refuse to replace what is at the output, unless it was asked for and is a model."""
        from flocking.models import embedded_file
        from flocking.pruning import refuse_existing

        source, how = self.source or embedded_file(), "pass --overwrite"
        refuse_existing(found, self.output, self.overwrite, source, how=how)

    @property
    def widths(self) -> int:
        """Of what numbers of neurons are multiples."""
        return self.multiple or (_MULTIPLE if self.is_gguf else 1)

    @property
    def down_type(self) -> str:
        """Type of the down-projections in a GGUF file."""
        return "Q8_0" if self.down is None else self.down

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
    """Write the smaller model; how small it is, and what it loses on held-out texts.

    The output is claimed from the beginning, so that a second command is refused before it has
    computed anything.
    """
    from flocking.artifacts import replacing
    from flocking.pruning import fixed_selection, split_texts

    request.check()
    texts = texts_of(request.texts)
    with (
        replacing(request.output, check=request.may_replace) as partial,
        naming(request.output, partial),
    ):
        model, tokenizer = load(request.source, request.device, request.dtype)
        request.check_model(model, partial.parent)
        calibration, sources, held_out = split_texts(model, texts, tokenizer)
        selection = fixed_selection(
            model,
            tokenizer,
            request.method,
            None if request.own_samples else calibration,
            request.density,
            sources=sources,
            multiple=request.widths,
            seed=request.seed,
        )
        if request.is_gguf:
            done = flocking.export_gguf(
                request.gguf(),
                selection,
                partial,
                down=request.down_type,
                progress=not is_quiet(),
            )
        else:
            done = flocking.export(
                model, selection, partial, tokenizer=tokenizer, held_out=held_out
            )
    done = replace(done, path=request.output)
    # (A GGUF file is in its place by now: whatever happens here, it stays.)
    return _measured(done, model, held_out, tokenizer) if request.is_gguf else done


def _measured(
    done: Exported,
    model: PreTrainedModel,
    held_out: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> Exported:
    """With what a GGUF file loses, by its own weights, read again, if that can be measured."""
    from flocking.models import is_out_of_memory, read_gguf
    from flocking.pruning import measure_lost

    # The file was compared with its source: without a number it is still good.
    try:
        written = read_gguf(done.path)
        # Buffers stay in their precision, as in `model`. (float32 may not fit the device.)
        for parameter in written.parameters():
            parameter.data = parameter.data.to(model.dtype)
        # (Decorated by transformers such that mypy does not see a method.)
        written.to(model.device)  # type: ignore[arg-type]
        return replace(done, lost=measure_lost(model, written, held_out, tokenizer=tokenizer))
    except (OSError, ValueError) as problem:  # transformers cannot read some narrower models
        why = f"the new file cannot be read here: {problem}"
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        why = "there is no memory for the new model beside the whole one"
    complain(f"what is lost was not measured, since {why}")
    return done


def texts_of(names: Sequence[str] | None) -> list[str]:
    """Texts of files, folders and standard input; without any, the packaged ones.

    Lines end as in Unix, and texts in which there is nothing are left out.
    """
    if not names:
        return list(flocking.passages())
    found = list(filter(str.strip, TextFiles(names)))
    if not found:
        raise ValueError(f"--texts {' '.join(names)}: there is no text in it: name other files.")
    return found
