"""`--part K/N` of the tests' conftest, by which CI takes a part of the matrix."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import part_of


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9))
def test_the_parts_together_are_the_whole_and_of_equal_size(items: list[Any], parts: int) -> None:
    found = [part_of(items, f"{number + 1}/{parts}") for number in range(parts)]
    assert sum(map(Counter, found), Counter()) == Counter(items)
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", ""])
def test_what_is_no_part_is_refused(part: str) -> None:
    with pytest.raises(pytest.UsageError, match=f"--part {part}: write K/N"):
        part_of([], part)
