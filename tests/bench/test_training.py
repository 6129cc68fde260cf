"""bench/training.py on a few bytes, and what docs/training.md says of the committed results."""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace

import pytest
import torch
from common import RESULTS, read_csv, write_whole
from scipy import stats

pytest.importorskip("transformers")
pytest.importorskip("gguf", reason="the text is read by the module that reads the model")
import training
from tables import training as tables

TEXT = torch.randint(97, 105, (4000,), generator=torch.Generator().manual_seed(0))
STEPS = 20
DENSE = training.Run("comparison", "dense", "none", "dense", 0, 0.0, 4e-3, 0, STEPS)
SPARSE = replace(DENSE, method="straight-through", mask="transposable", pattern="8:16", refresh=5)


@pytest.fixture
def train(monkeypatch):
    monkeypatch.setattr(training, "SMALL", 4)
    monkeypatch.setattr(training, "LARGE", 8)
    return lambda run: training.train(run, TEXT, TEXT[:1000])


def numbers(row: dict[str, object], column: str) -> list[float]:
    return [float(number) for number in str(row[column]).split()]


# --- the runs -----------------------------------------------------------------------------------------------


def test_a_run_learns_and_is_the_same_again(train):
    row = train(DENSE)
    assert {key: row[key] for key in asdict(DENSE)} == asdict(DENSE)
    curve = numbers(row, "curve")
    assert len(curve) == training.POINTS
    assert float(row["held_out"]) < curve[0] - 1
    assert (row["kept"], row["moved_in_all"], row["moved"]) == (1.0, 0.0, "")
    assert train(DENSE)["curve"] == row["curve"]


def test_ways_of_a_seed_begin_alike_and_differ_as_their_names_say(train):
    fixed = train(replace(SPARSE, method="fixed", refresh=0))
    rows = {refresh: train(replace(SPARSE, refresh=refresh)) for refresh in (1, 5, STEPS)}
    assert fixed["moved_in_all"] == 0
    assert set(numbers(fixed, "flips")) == {0.0}
    assert numbers(rows[1], "flips")[0] > 0
    assert numbers(rows[5], "flips")[:4] == [0.0] * 4
    assert numbers(rows[5], "flips")[4] > 0
    assert len({row["held_out"] for row in (fixed, *rows.values())}) == 4
    assert 0.5 < fixed["kept"] < 1
    for row in rows.values():
        moves = numbers(row, "moved")
        assert len(moves) == 10
        assert max(moves) - 1e-4 <= row["moved_in_all"] <= sum(moves) + 1e-4
    first = {numbers(row, "curve")[0] for row in (fixed, rows[5], rows[STEPS])}
    assert max(first) - min(first) < 0.02


def test_a_frozen_end_is_one_without_flips(train):
    moves = numbers(train(replace(SPARSE, method="frozen end", refresh=1)), "moved")
    assert min(moves[:7]) > 0
    assert moves[8:] == [0, 0]
    assert numbers(train(replace(SPARSE, refresh=1)), "moved")[:7] == moves[:7]


@pytest.mark.parametrize(("method", "decay"), [("sr-ste", 10.0), ("gradient decay", 1.0)])
def test_decay_is_in_the_run(train, method, decay):
    plain = train(SPARSE)
    decayed = train(replace(SPARSE, method=method, decay=decay))
    assert decayed["kept"] > plain["kept"]


def test_ordinary_masks_keep_more(train):
    first, second = train(replace(SPARSE, mask="ordinary")), train(SPARSE)
    assert first["kept"] > second["kept"]


def test_the_text_that_is_held_out_is_spread(monkeypatch):
    seen = []
    monkeypatch.setattr(training, "loss", lambda model, part: seen.append(part) or torch.tensor(1.0))
    training.held_out(torch.nn.Identity(), torch.arange(1000), 7)
    (drawn,) = seen
    assert drawn.shape == (7, training.WINDOW + 1)
    assert (int(drawn[0, 0]), int(drawn[-1, -1])) == (0, 999)


def test_the_learning_rate_goes_up_and_down():
    rates = [training.rate_at(step, 200) for step in range(200)]
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_the_pilot_chooses_the_lowest_loss_and_waits_for_its_runs():
    runs, value = training.pilot([], STEPS, "dense")
    assert [run.rate for run in runs] == list(training.PILOT["dense"])
    assert value is None
    assert training.pilot([], STEPS, "sr-ste") == ([], None)
    losses = {run.key(): loss for run, loss in zip(runs, (2.0, 1.0, 3.0), strict=True)}
    columns = list(asdict(runs[0]))
    rows = [{**dict(zip(columns, key, strict=True)), "held_out": str(v)} for key, v in losses.items()]
    assert training.pilot(rows, STEPS, "dense") == (runs, runs[1].rate)
    decays, value = training.pilot(rows, STEPS, "sr-ste")
    assert value is None
    assert {(run.rate, run.refresh) for run in decays} == {(runs[1].rate, 1)}
    assert training.pilot(rows[:2], STEPS, "dense")[1] is None


def test_what_is_in_the_file_is_not_run_again(monkeypatch, tmp_path):
    out = tmp_path / "training.csv"
    ran = []

    def pretend(run, learned, test):
        ran.append(run)
        return {**asdict(run), "held_out": f"{run.rate + run.decay:.5f}"}

    monkeypatch.setattr(training, "train", pretend)
    monkeypatch.setattr(training, "texts", lambda: ("a", "b"))
    monkeypatch.setattr(training, "append_csv", lambda path, row, *_: append(path, row))
    command = ["training", "--seeds", "2", "--steps", "20", "--pilot-steps", "40", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    training.main()
    per_seed = 1 + 7 * len(training.PATTERNS) + 2
    assert len(ran) == len(set(ran)) == sum(map(len, training.PILOT.values())) + 2 * per_seed
    assert {run.rate for run in ran if run.part == "comparison"} == {min(training.PILOT["dense"])}
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-3]))  # as after a kill
    ran.clear()
    training.main()
    assert len(ran) == 3
    assert out.read_text().splitlines(keepends=True) == lines
    ran.clear()
    monkeypatch.setattr(
        "sys.argv", [*command, "--steps", "60", "--patterns", "2:4", "--methods", "fixed", "dense"]
    )
    training.main()
    assert {(run.method, run.pattern, run.steps) for run in ran} == {
        ("fixed", "2:4", 60),
        ("dense", "dense", 60),
    }
    assert len(ran) == 4


def append(path, row):
    write_whole(path, [*(read_csv(path) if path.exists() else []), row])


@pytest.mark.parametrize("option", ["--steps", "--pilot-steps"])
@pytest.mark.parametrize("steps", ["0", "30", "-20"])
def test_steps_that_do_not_divide_are_refused(monkeypatch, capsys, option, steps):
    monkeypatch.setattr("sys.argv", ["training", option, steps])
    with pytest.raises(SystemExit):
        training.main()
    assert f"{option}: expected a multiple of 20" in capsys.readouterr().err


def test_differences_are_those_of_a_paired_t_test():
    first, second = {"0": 2.0, "1": 2.3, "2": 2.1}, {"0": 1.9, "1": 2.1, "2": 2.05}
    found = tables.difference(first, second)
    test = stats.ttest_rel(list(first.values()), list(second.values()))
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.clear == (test.pvalue < 0.05)
    assert tables.spread(first.values()) == f"2.133 ± {statistics.stdev(first.values()):.3f}"


# --- what docs/training.md says of the results --------------------------------------------------------------


def against(first: tables.Way, second: tables.Way) -> dict[str, tables.Difference]:
    """Pattern -> difference of the losses."""
    return {
        size: tables.difference(tables.held_out(first, size), tables.held_out(second, size))
        for size in tables.patterns()
    }


def test_every_way_ran_at_every_pattern_with_three_seeds():
    assert {"2:4", "16:32"} <= set(tables.patterns())
    found = tables.runs()
    for size in tables.patterns():
        for way in tables.NAMES:
            assert len(found[way, "dense" if way == tables.DENSE else size]) == 3, (way, size)
    assert all(len(found[way, "2:4"]) == 3 for way in tables.FROZEN.values())


def test_plain_straight_through_is_worse_the_rarer_it_is_refreshed():
    for pattern, found in against(tables.EVERY_STEP, tables.EVERY_40).items():
        assert found.clear or pattern == "8:16"  # where the page says that it is not
        assert found.mean < 0
    for found in against(tables.EVERY_200, tables.EVERY_40).values():
        assert found.clear
        assert found.mean > 0
    for found in against(tables.EVERY_40, tables.DENSE).values():
        assert found.clear
        assert found.mean > 0


def test_decay_of_pruned_weights_mends_it():
    for found in against(tables.GRADIENT_DECAY, tables.EVERY_40).values():
        assert found.clear
        assert found.mean < 0
    found = against(tables.SR_STE, tables.EVERY_STEP)
    assert all(difference.mean < 0 for difference in found.values())
    assert found["2:4"].clear


@pytest.mark.parametrize("way", [tables.SR_STE, tables.GRADIENT_DECAY])
def test_no_way_is_told_from_the_fixed_mask_once_pruned_weights_decay(way):
    assert not any(found.clear for found in against(way, tables.FIXED).values())


def test_transposable_masks_are_not_told_from_ordinary_ones():
    assert not any(found.clear for found in against(tables.EVERY_40, tables.ORDINARY).values())


def test_what_a_refresh_shortly_before_the_end_costs():
    plain = tables.held_out(tables.EVERY_200, "2:4")
    frozen = tables.held_out(tables.FROZEN[tables.EVERY_200], "2:4")
    fixed = tables.held_out(tables.FIXED, "2:4")
    healed, harm = tables.difference(frozen, plain), tables.difference(plain, fixed)
    assert healed.clear
    assert healed.mean < -harm.mean / 2
    often = tables.held_out(tables.FROZEN[tables.EVERY_40], "2:4")
    assert abs(tables.difference(often, tables.held_out(tables.EVERY_40, "2:4")).mean) < harm.mean / 10
    for left in (tables.difference(frozen, fixed), tables.difference(often, fixed)):
        assert left.clear
        assert left.mean > 0
    for rows in (tables.runs()[tables.EVERY_200, size] for size in tables.patterns()):
        for row in rows.values():
            before, after = numbers(row, "curve")[-2:]
            assert after > before + 0.02


def test_masks_settle_where_pruned_weights_decay():
    rows = tables.runs()
    for size in tables.patterns():
        for decayed, plain in (
            (tables.SR_STE, tables.EVERY_STEP),
            (tables.GRADIENT_DECAY, tables.EVERY_40),
        ):
            for seed, row in rows[decayed, size].items():
                other = rows[plain, size][seed]
                assert sum(numbers(row, "moved")) < sum(numbers(other, "moved")) / 2
                assert float(row["kept"]) > 0.9 > float(other["kept"])


def test_a_refresh_costs_what_the_page_says():
    rows = read_csv(RESULTS / "training_refresh.csv")
    assert {row["pattern"] for row in rows} == {"2:4", "4:8", "8:16", "16:32"}
    most = {"2:4": 7, "4:8": 3.5, "8:16": 2.5, "16:32": 2.5}
    assert all(float(row["over_ordinary"]) <= most[row["pattern"]] for row in rows)
    assert all(float(row["of_a_step"]) < 0.1 for row in rows)
    assert max(int(row["weights"]) for row in rows) > 1e8


def test_the_picture_is_drawn_from_the_results(tmp_path):
    plots = pytest.importorskip("plots", exc_type=ImportError)
    plots.training(read_csv(RESULTS / "training.csv"), tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
