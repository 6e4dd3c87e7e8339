"""A Matplotlib figure as the bytes of a PNG."""

import io
import warnings


def png(figure) -> bytes:
    """Letters that no installed font has, in the name of a model or folder, are drawn as boxes, without warnings."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
