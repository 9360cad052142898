"""The tables beside the peers and the profile of an update, without any peer: those have environments of their own."""

import csv
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import ppo_s5_popgym as ppo
from benchmarks import profile_update
from benchmarks.peers import ours, run
from benchmarks.timing import Timing

LEARNT_FROM = run.Comparison(
    theirs=run.Side("PPO, s5", "memorax", "memorax_ppo.py", {}),
    ours=(run.Side("PPO, s5", "", "ours.py", {}), run.Side("PPO, gru", "", "ours.py", {})),
    steps=1000,
)
SAMPLES = {
    run.Quantity("update", True): {
        "ours: PPO, s5": [5.0, 7.0],
        "ours: PPO, gru": [2.0, 2.0],
        "memorax: PPO, s5": [20.0, 21.0],
    },
    run.Quantity("update", False): {
        "ours: PPO, s5": [0.5, 0.25, 0.5],
        "ours: PPO, gru": [1.0, 1.0, 1.0],
        "memorax: PPO, s5": [1.0, 1.0, 2.0],
    },
}


def test_a_ratio_is_of_samples_of_the_same_turn():
    rows = run.rows_of(LEARNT_FROM, SAMPLES)
    found = [(row["ours"], row["quantity"], row["unit"], float(row["ratio_median"])) for row in rows]
    assert found == [
        ("ours: PPO, s5", "compile update", "s", 3.5),  # of 4 and 3
        ("ours: PPO, s5", "update", "steps/s", 4.0),  # of 2, 4 and 4
        ("ours: PPO, gru", "compile update", "s", 10.25),
        ("ours: PPO, gru", "update", "steps/s", 1.0),
    ]
    steps_per_second = rows[1]
    assert float(steps_per_second["ours_median"]) == 2000 and float(steps_per_second["theirs_median"]) == 1000
    assert float(steps_per_second["ratio_min"]) == 2 and float(steps_per_second["ratio_max"]) == 4


def test_what_a_peer_does_not_compile_has_no_row():
    samples = {quantity: dict(sides) for quantity, sides in SAMPLES.items()}
    del samples[run.Quantity("update", True)]["memorax: PPO, s5"]
    assert {row["quantity"] for row in run.rows_of(LEARNT_FROM, samples)} == {"update"}


def test_rows_are_saved_as_csv_and_as_a_table(tmp_path):
    rows = run.rows_of(LEARNT_FROM, SAMPLES)
    run.save(tmp_path, rows, {"rows": len(rows)})
    with (tmp_path / "speed.csv").open() as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in row.items()} for row in rows]
    lines = (tmp_path / "speed.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    assert lines[3] == "| memorax: PPO, s5 | ours: PPO, s5 | update | 2,000 steps/s | 1,000 steps/s | 4.00x | 2 to 4 |"
    assert json.loads((tmp_path / "speed.json").read_text()) == {"rows": 4}


def test_rows_of_the_paper_s_form_read_what_s5_layer_kept():
    result = json.loads((ROOT / "results/s5_layer.json").read_text())
    rows = run.paper_layer_rows(result)
    (gradient,) = [row for row in rows if row["quantity"] == "forward+backward, T=1024"]
    kept = [row for row in result["rows"] if row["kind"] == "forward+backward" and row["T"] == 1024]
    assert float(gradient["ratio_median"]) == pytest.approx(kept[0]["run_over_ours"]["paper"], rel=1e-3)
    assert set(rows[0]) == set(run.rows_of(LEARNT_FROM, SAMPLES)[0])  # one table holds both


def test_processes_report_themselves_and_time_one_call_at_a_time(tmp_path):
    script = tmp_path / "counting.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.peers.worker import Worker
worker = Worker()
calls = []
def count():
    calls.append(len(calls))
    print("noise of a package", calls)
worker.serve({{"count": count}}, {{"count": worker.settings["compile"]}}, ("pytest",))
""")
    side = run.Side("count", "", str(script), {"compile": 3.0})
    comparison = run.Comparison(theirs=side._replace(peer="peer"), ours=(side,), steps=1)
    args = run.Args(rounds=2, repeats=3)
    samples, versions = run.measure(args, comparison, {"peer": sys.executable})
    assert versions == {name: {"pytest": pytest.__version__} for name in ("ours: count", "peer: count")}
    assert samples[run.Quantity("count", True)] == {"ours: count": [3.0, 3.0], "peer: count": [3.0, 3.0]}
    running = samples[run.Quantity("count", False)]
    assert all(len(seconds) == 6 and min(seconds) > 0 for seconds in running.values())


def test_a_process_that_fails_ends_the_run(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"failing.py ended with exit code 3"):
        run.Process(sys.executable, script, {})


@pytest.mark.parametrize("peer", ["memorax", "sb3", "memax"])
def test_a_peer_s_packages_are_pinned_to_our_own_versions_where_we_have_them(peer):
    def pins(table):
        lines = [line.split("#")[0].strip() for line in (ROOT / table).read_text().splitlines()]
        return dict(line.split("==") for line in lines if line and not line.startswith("-r"))

    pinned = pins(f"benchmarks/peers/{peer}.txt")
    own = pins("requirements.txt")
    assert all(pinned)
    assert {name: version for name, version in pinned.items() if name in own} == {
        name: own[name] for name in pinned if name in own
    }


@pytest.mark.slow  # compiles an associative scan of complex numbers
def test_the_paper_s_form_of_s5_does_the_same_as_ours():
    args = ppo.Args(s5_width=6, s5_state=4)
    layer = ppo.S5Layer(args)
    paper = ours.PaperS5(args)
    carry = jax.random.normal(jax.random.key(0), (2, 8))
    x = jax.random.normal(jax.random.key(1), (3, 2, 6))
    start = jnp.zeros((3, 2)).at[1, 1].set(1.0)

    @jax.jit
    def both(key):
        params = layer.init(key, carry, x, start, method="scan")
        return [which.apply(params, carry, x, start, method="scan") for which in (layer, paper)]

    expected, found = both(jax.random.key(2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_counted_operations_are_those_of_jax_s_cost_analysis():
    """All but the matrix products, which it counts too, is a small share at these widths."""
    setup = ppo.make_setup(ppo.Args())
    network = setup.network
    T, B = 1, 256
    carry = [layer.initial_carry(B) for layer in ppo.make_memory(setup.args)]
    obs, start = jnp.zeros((T, B, network.num_inputs)), jnp.zeros((T, B))
    init = jax.eval_shape(lambda key: network.init(key, carry, obs, start, method="scan"), jax.random.key(0))

    def forward(params):
        _, policy, value = network.apply(params, carry, obs, start, method="scan")
        return policy.mean, value

    def loss(params):
        mean, value = forward(params)
        return jnp.mean(mean**2) + jnp.mean(value**2)

    for function, counted in ((forward, profile_update.forward_flops), (jax.grad(loss), profile_update.gradient_flops)):
        found = jax.jit(function).lower(init).cost_analysis()["flops"]
        flops = sum(counted(network, T * B).values())
        assert flops < found < 1.15 * flops, (function, flops, found)


def test_a_profile_s_parts_and_the_rest_make_up_the_whole():
    def part(name, flops=0):
        return profile_update.Part(name, None, (), flops)

    sections = {
        "machine": [part("big square product", 100)],
        "acting": [part("rollout", 10), part("encoder", 10), part("environment")],
        "learning": [part("update", 40), part("memory", 30), part("of it recurrence")],
    }
    seconds = {
        ("machine", "big square product"): 1.0,
        ("acting", "rollout"): 2.0,
        ("acting", "encoder"): 0.5,
        ("acting", "environment"): 1.0,
        ("learning", "update"): 5.0,
        ("learning", "memory"): 2.0,
        ("learning", "of it recurrence"): 1.0,
    }
    timings = {name: Timing(median=taken, minimum=taken) for name, taken in seconds.items()}
    rows = profile_update.rows_of(sections, timings)
    found = {(row["section"], row["part"]): row for row in rows}
    assert found["acting", "the rest"]["seconds"] == 0.5
    assert found["learning", "all of it"]["seconds"] == 3.0 and found["learning", "all of it"]["flops"] == 30
    assert found["learning", "the rest"]["seconds"] == 1.0  # the recurrence is part of the memory
    assert found["acting", "encoder"]["share_of_peak"] == 0.2
    assert all(len(profile_update.cells(row)) == len(profile_update.HEADER) for row in rows)
