"""Messages are one printable line, whatever the names in them."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from fptq_onnx.errors import FptqError


@given(st.text(), st.text(), st.text(min_size=1))
@example("model\n.onnx", "\x1b[2Jgone\r", "try\u2028again")
@example("a\x00b\x85c", "\u202e", "fix")
def test_one_printable_line(where: str, reason: str, fix: str) -> None:
    message = str(FptqError(where, reason, fix))
    assert message.isprintable() and message.splitlines() == [message]


@given(st.text(st.characters(categories=("L", "N", "P", "S"), codec="utf-8")))
def test_ordinary_names_stay_as_they_are(name: str) -> None:
    error = FptqError(name, "it is broken", "repair it")
    assert error.where == name and str(error) == f"{name}: it is broken. Repair it."
