"""Seeded faults can be seeded, the tests that have to find them are there, and three of them do: `make mutants` tries all."""

from .reliability.mutants import MUTANTS, ROOT, copy_of_the_tree, is_killed, seeded, whole

CHOSEN = {"keys beyond the last weigh as zeros", "gradient of b_v without γ", "first reason only"}


def test_every_fault_can_be_seeded():
    assert len(MUTANTS) == len({m.name for m in MUTANTS})
    for mutant in MUTANTS:
        assert seeded((ROOT / mutant.file).read_text(encoding="utf-8"), mutant)


def test_every_killer_is_there_and_two_of_them_kill():
    with copy_of_the_tree(interpreter=False) as copy:
        assert copy.imports_its_own_files()
        collected = copy.collect(sorted({whole(m.killer) for m in MUTANTS}))
        assert [m.killer for m in MUTANTS if not any(test.startswith(m.killer) for test in collected)] == []
        some = [m for m in MUTANTS if m.name in CHOSEN and not m.interpreter]
        assert [is_killed(copy, m) for m in some] == [True, True]
        assert not is_killed(copy, some[0]._replace(new=some[0].old)), "a fault that changes nothing has to survive"


def test_one_of_them_kills_in_the_interpreter():
    with copy_of_the_tree(interpreter=True) as copy:
        assert copy.imports_its_own_files()
        assert [is_killed(copy, m) for m in MUTANTS if m.name in CHOSEN and m.interpreter] == [True]
