"""The command that draws a text at one layer.

What needs torch is imported inside of the command, so that help and version are quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import flocking
from flocking.cli.front import app
from flocking.cli.options import Device, Dtype, Model, load, read
from flocking.cli.printing import counted, printable, say
from flocking.cli.session import notice, reporting, result

if TYPE_CHECKING:
    import xarray as xr
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SUFFIXES = (".png", ".svg")
_FEWEST = 3  # tokens: the first, which is left out, and two that can be consistent
_MOST = 2**14  # rows or columns: two heat maps of them are as large as a picture can be
_LONGEST = 40  # characters of a file's name in the picture


@app.command(epilog="Example: flocking heatmap article.txt --layer 7 -o article.png")
@reporting
def heatmap(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Text file; - is standard input.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Picture to write, a .png or .svg file."
        ),
    ],
    layer: Annotated[
        int | None, typer.Option(help="Layer; by default the one two thirds up.")
    ] = None,
    model: Model = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            help="Read at most this many tokens, and no more than the model's context has; the "
            "first is not drawn."
        ),
    ] = 257,
    neurons: Annotated[int, typer.Option(help="Draw at most this many neurons, the first.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw a text's relative activations at one layer, tokens against neurons.

    Vertical streaks are neurons that flock. Beside the model's, the same tokens in a network of the
    same shape with random weights. A picture that this command wrote before is replaced.
    """
    from flocking.artifacts import replacing
    from flocking.cli.outputs import refuse_nothing, refuse_other_than_heatmaps
    from flocking.cli.pictures import beside_control, save_picture
    from flocking.models import context
    from flocking.recording import check_numbers

    check_numbers(seed=seed)
    _refuse_beyond(max_tokens, _FEWEST, "--max-tokens")
    _refuse_beyond(neurons, 1, "--neurons")
    refuse_nothing("output", output)
    if output.suffix not in _SUFFIXES:
        raise ValueError(f"{output}: pictures are PNG or SVG, whose names end in .png or .svg.")
    text = read(file)
    with replacing(output, check=refuse_other_than_heatmaps) as partial:
        loaded, tokenizer = load(model, device, dtype)
        shown = _layer_of(loaded, layer)
        max_tokens = min(max_tokens, context(loaded) or max_tokens)
        own, random = _recorded(loaded, tokenizer, text, shown, max_tokens, seed)
        document = _measured(own, random, neurons)
        told = _sentence(document)
        sizes = {"tokens": max_tokens, "neurons": neurons}
        figure = beside_control(own, random, shown, 0, _name_of(file), **sizes)
        title = f"heatmap, {document['model']}, layer {shown}"
        about = {"Title": title, "Source": document["model"], "Description": told}
        save_picture(figure, partial, about)
    result({"output": output, **document}, lambda: say(f"wrote {output}: {told}"))
    notice("vertical streaks are neurons that flock; compare them with those of random weights")


def _refuse_beyond(value: int, fewest: int, option: str) -> None:
    """Refuse a number of rows or columns that makes no picture."""
    if not fewest <= value <= _MOST:
        raise ValueError(f"{option} {value}: give {fewest} to {_MOST}.")


def _layer_of(model: PreTrainedModel, layer: int | None) -> int:
    """The layer that is drawn; one that the model lacks is refused."""
    layers = [block.layer for block in flocking.feedforwards(model)]
    if layer is None:
        return layers[2 * len(layers) // 3]  # where most models flock clearly
    if layer not in layers:
        gapless = layers == list(range(layers[0], layers[-1] + 1))
        named = f"{layers[0]} to {layers[-1]}" if gapless else ", ".join(map(str, layers))
        raise ValueError(f"--layer {layer}: this model has FF blocks in layers {named}.")
    return layer


def _recorded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    layer: int,
    max_tokens: int,
    seed: int,
) -> tuple[xr.Dataset, xr.Dataset]:
    """The layer's recording of the model, and of its control."""
    random = flocking.control(model, seed)  # (refuses a seed before anything takes long)
    found = []
    for subject in (model, random):
        recording = flocking.record(
            subject,
            text,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            layers=[layer],
            relative=[layer],
            progress=False,
        )
        tokens = int(recording.tokens.sum())
        if tokens < _FEWEST:
            raise ValueError(
                f"the text has {counted(tokens, 'token')}, of which the first is not drawn: give "
                f"one of {_FEWEST} or more."
            )
        found.append(recording)
    own, other = found
    return own, other


def _measured(own: xr.Dataset, random: xr.Dataset, neurons: int) -> dict[str, Any]:
    """What the picture is of, and how strongly it flocks."""
    from flocking.cli.pictures import name_of

    return {
        "model": name_of(own),
        "layer": own.layer.item(),
        "module": own.module.item(),
        "d_ff": own.d_ff.item(),
        "tokens": int(own.tokens.sum()) - 1,
        "neurons": min(neurons, own.d_ff.item()),
        "flocking_score": flocking.flocking_score(own).item(),
        "flocking_score_control": flocking.flocking_score(random).item(),
    }


def _sentence(document: dict[str, Any]) -> str:
    """The same in words."""
    return (
        f"layer {document['layer']} of {document['model']}, {document['tokens']} tokens by "
        f"{document['neurons']} of {document['d_ff']} neurons; flocking score "
        f"{document['flocking_score']:.2f}, random weights "
        f"{document['flocking_score_control']:.2f} (chance 0)"
    )


def _name_of(file: str) -> str:
    """What the picture calls a text file, in characters that every font has."""
    name = "standard input" if file == "-" else Path(file).name
    name = printable(name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}...")
    return name.encode("latin-1", "backslashreplace").decode("latin-1")
