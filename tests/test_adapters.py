"""No `extra_key` spells the key of an adapter."""

import string

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sgl_lmcache.adapters import unambiguous_key

IDS = st.text("0123456789abcdef", min_size=32, max_size=32)
EXTRA_KEYS = st.text(string.ascii_lowercase + string.digits + "/", max_size=70)


def as_sglang_makes_it(extra_key: str, lora_id: str | None) -> str:
    return extra_key + (lora_id or "")


def key(extra_key: str, lora_id: str | None) -> str:
    return unambiguous_key(as_sglang_makes_it(extra_key, lora_id), lora_id)


@given(EXTRA_KEYS, st.none() | IDS, EXTRA_KEYS, st.none() | IDS)
def test_different_requests_have_different_keys(
    extra_key: str, lora_id: str | None, other_extra_key: str, other_lora_id: str | None
) -> None:
    same = (extra_key, lora_id) == (other_extra_key, other_lora_id)
    assert (key(extra_key, lora_id) == key(other_extra_key, other_lora_id)) == same


@given(EXTRA_KEYS, IDS)
@pytest.mark.parametrize("form", ["{id}", "{extra}{id}", "{id}/{extra}", "/{id}", "{id}/"])
def test_whoever_knows_an_adapters_id_cannot_spell_its_key(form: str, extra_key: str, lora_id: str) -> None:
    forged = form.format(id=lora_id, extra=extra_key)
    assert key(forged, None) != key(extra_key, lora_id)
    assert key(forged, None) != key("", lora_id)


@given(EXTRA_KEYS, IDS, IDS)
def test_nor_can_a_request_with_another_adapter(extra_key: str, lora_id: str, own_lora_id: str) -> None:
    if lora_id != own_lora_id:
        assert key(f"{extra_key}{lora_id}", own_lora_id) != key(extra_key, lora_id)
