"""The restricted unpickler: plain values come back, everything else is refused, and nothing is ever run."""

from __future__ import annotations

import collections
import decimal
import pickle
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geopd.checkpoints import CheckpointError
from geopd.checkpoints.pickled_values import Constant, Inert, inert
from geopd.checkpoints.restricted_pickle import PickleLimits, read_pickle
from hostile import Touches

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


def outcome(data: bytes) -> str:
    try:
        read_pickle(data, "f.pt", {})
    except CheckpointError as error:
        return str(error)
    return "f.pt: read"


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_pickle(data, "f.pt", options.pop("allow", {}), **options)
    return str(caught.value)


@settings(deadline=None, max_examples=100)
@given(PLAIN, st.integers(2, 5))
def test_plain_values_come_back_under_every_protocol_torch_uses(value: object, protocol: int) -> None:
    allow = {"_codecs.encode": lambda text, _: text.encode("latin1"), "__builtin__.bytes": bytes}
    assert read_pickle(pickle.dumps(value, protocol), "f.pt", allow) == value


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_message(data: bytes) -> None:
    assert outcome(data).startswith("f.pt: ")


@settings(deadline=None, max_examples=100)
@given(PLAIN, st.data())
def test_a_pickle_with_changed_bytes_is_a_value_or_a_message(value: object, draw: st.DataObject) -> None:
    data = bytearray(pickle.dumps(value, 4))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    assert outcome(bytes(data)).startswith("f.pt: ")


def test_a_text_with_an_unknown_escape_is_a_value_or_a_message() -> None:
    assert outcome(b"S'\\g'\n.").startswith("f.pt: ")


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_creates_a_file_does_not(protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps([Touches(canary)], protocol)
    message = refusal(data)
    assert ".open'" in message
    assert "refused, nothing was run" in message
    assert not canary.exists()
    pickle.loads(data)[0].close()
    assert canary.exists(), "the attack is one: the ordinary reader runs it"


@pytest.mark.parametrize(
    "attack",
    [
        b"cos\nsystem\n(S'touch canary'\ntR.",
        b"(S'touch canary'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch canary'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",  # STACK_GLOBAL
        b"\x80\x02cbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R.",
        b"\x80\x02\x82\x01.",  # EXT1, the extension registry
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85}\x92.",  # NEWOBJ_EX
        b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00f\x85R.",
    ],
)
def test_every_way_to_name_a_callable_is_refused(
    attack: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "refused" in refusal(attack)
    assert not any(tmp_path.iterdir())


def test_an_allowed_global_cannot_be_used_to_reach_another() -> None:
    """A dotted name is one key of the allow-list: no attribute of an allowed object is ever looked up."""
    allow = {"collections.OrderedDict": dict, "torch.float32": Constant(torch.float32)}
    attack = b"\x80\x04\x8c\x0bcollections\x8c\x15OrderedDict.__class__\x93."
    assert "names 'collections.OrderedDict.__class__'" in refusal(attack, allow=allow)
    assert "calls dtype" in refusal(b"\x80\x02ctorch\nfloat32\n)R.", allow=allow)
    assert "gives a state to Global" in refusal(b"\x80\x02ccollections\nOrderedDict\n}b.", allow=allow)


def test_classes_of_the_allow_list_become_inert_objects_and_constants() -> None:
    allow = {
        **inert("decimal.Decimal"),
        "collections.OrderedDict": lambda: {},
        "torch.bfloat16": Constant(torch.bfloat16),
    }
    ordered = collections.OrderedDict(a=1)
    ordered.note = decimal.Decimal("2.5")  # type: ignore[attr-defined]
    value = read_pickle(pickle.dumps([decimal.Decimal("1.5"), ordered], 2), "f.pt", allow)
    assert isinstance(value[0], Inert)
    assert (value[0].name, value[0].args) == ("decimal.Decimal", ("1.5",))
    assert value[1] == {"a": 1}
    assert read_pickle(b"\x80\x02ctorch\nbfloat16\n.", "f.pt", allow) is torch.bfloat16


def test_storages_need_a_file_that_has_them() -> None:
    data = b"\x80\x02X\x01\x00\x00\x00kQ."
    assert "refers to storages" in refusal(data)
    assert read_pickle(data, "f.pt", {}, persistent=lambda key: f"<{key}>") == "<k>"


def deep_lists(n: int) -> bytes:
    return b"\x80\x02" + b"]" * n + b"a" * (n - 1) + b"."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (deep_lists(100_000), "nests deeper than 64 levels or holds itself"),
        (b"\x80\x02N" + b"\x85" * 100_000 + b".", "nests deeper than 64 levels or holds itself"),
        (b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.", "a key of type tuple"),  # hashing it would overflow the C stack
        (b"\x80\x02]q\x00h\x00a.", "levels or holds itself"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "nests deeper than 64 levels"),
        (b"\x80\x02" + b"}" * 300_000 + b".", "more objects than a file of its size can hold"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.", "not a readable pickle"),  # BINBYTES8
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.", "not a readable pickle"),  # BYTEARRAY8
        (b"I" + b"9" * 100_000 + b"\n.", "not a readable pickle"),
        (b"\x80\x02", "not a readable pickle"),
        (b".", "not a readable pickle"),
        (b"", "not a readable pickle"),
        (b"\x80\x02h\x07.", "not a readable pickle"),
        (b"\x80\x02}K\x01a.", "appends to dict"),
        (b"\x80\x02](K\x01u.", "sets keys of list"),
        (b"\x80\x02}(K\x01u.", "not a readable pickle"),
        (b"\x80\x02\x8f.", "uses EMPTY_SET, which no weights need"),
    ],
)
def test_a_pickle_that_claims_too_much_is_a_message_at_once(data: bytes, message: str) -> None:
    began = time.process_time()
    assert message in refusal(data)
    assert time.process_time() - began < 5
    tracemalloc.start()  # which slows the reading down
    refusal(data[:100_000])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data) + 20_000_000


def test_a_huge_memo_index_claims_no_memory() -> None:
    tracemalloc.start()
    assert read_pickle(b"\x80\x02Nr\xff\xff\xff\x7f.", "f.pt", {}) is None
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_objects_met_many_times_do_not_multiply_the_work() -> None:
    """Thirty lists, each holding the one before twice: 2^30 paths."""
    data = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(30)) + b"."
    with pytest.raises(CheckpointError, match=r"f\.pt: its pickle shares objects inside one another"):
        read_pickle(data, "f.pt", {})


def test_limits_are_the_callers() -> None:
    data = pickle.dumps([[[1]], *range(300)], 2)
    assert "at most 10 are read" in refusal(data, limits=PickleLimits(nbytes=10))
    assert "more than 50 instructions" in refusal(data, limits=PickleLimits(instructions=50))
    assert "nests deeper than 2 levels" in refusal(data, limits=PickleLimits(nesting=2))
    assert "more objects" in refusal(pickle.dumps([[] for _ in range(500)], 2), limits=PickleLimits(objects=10))
