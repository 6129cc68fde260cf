"""Wrong files of every kind, given to the commands that read them: one line, an exit code, and nothing else.

support/fuzzed_files.py makes them, says what has to hold and runs a case alone; a few are tried here, and
thousands with ``-m slow``.
"""

from __future__ import annotations

import shutil

import pytest
from fuzzed_files import KINDS, check, make_bases, plan

pytest.importorskip("transformers")

FEW, MANY = 120, 5000
APART = (("file", 14), ("index", 0))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


def check_all(cases, bases, tmp_path, **options) -> dict[int, int]:
    """How many cases there were of each exit code; all that fail are told."""
    codes: dict[int, int] = {}
    failed = []
    for kind, seed in cases:
        tree = tmp_path / "tree"
        tree.mkdir()
        try:
            code, _ = check(kind, seed, bases, tree, **options)
            codes[code] = codes.get(code, 0) + 1
        except AssertionError as error:
            failed.append(str(error))
        shutil.rmtree(tree)
    assert not failed, "\n\n".join(failed)
    return codes


def of_kind(kind: str, count: int) -> list[tuple[str, int]]:
    return [case for case in plan(count) if case[0] == kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_few(kind, bases, tmp_path):
    check_all(of_kind(kind, FEW), bases, tmp_path)


def test_in_a_process_of_its_own(bases, tmp_path):
    check_all(APART, bases, tmp_path, apart=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many(kind, bases, tmp_path):
    codes = check_all(of_kind(kind, MANY), bases, tmp_path)
    assert {0, 2} <= codes.keys(), "some inputs are right all the same, most are not"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "index", "config", "weights", "resume", "tokens"])
def test_some_in_processes_of_their_own(kind, bases, tmp_path):
    check_all([(kind, 10_000 + seed) for seed in range(10)], bases, tmp_path, apart=True)
