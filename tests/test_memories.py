"""Every memory, through the whole actor-critic: the two ways through it agree, and it sees what it may and no more."""

import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ARCHS, RESETTING, Net, as_flags, cached_net, fast_jit, others_slow, random_sequence

import popgym_jax
from benchmarks import memories
from benchmarks.collect import read_rows

T, B = 24, 6


@pytest.mark.parametrize("seed", range(3))
def test_scan_equals_step_by_step(net: Net, seed):
    carry = net.stored_carry(B)
    obs, start = random_sequence(seed, T, B, net.features)
    last, *outputs = net.scan(net.params, carry, obs, start)
    last_step, step_outputs = net.steps(carry, obs, start)
    np.testing.assert_allclose(net.outputs(carry, obs, start), step_outputs, atol=1e-5)
    again, start = random_sequence(seed + 10, T, B, net.features)  # the two carries are as good as each other
    start = jnp.zeros_like(start)
    np.testing.assert_allclose(net.outputs(last, again, start), net.outputs(last_step, again, start), atol=1e-5)


def test_scan_equals_step_by_step_with_continuous_actions():
    net = cached_net("s5", discrete=False)
    obs, start = random_sequence(0, T, B, net.features)
    carry = net.stored_carry(B)
    np.testing.assert_allclose(net.outputs(carry, obs, start), net.steps(carry, obs, start)[1], atol=1e-5)


def packed_and_separate(net):
    """Outputs of episodes of 8, 1, 8, 7 steps read as one sequence with resets, and each by itself from zero."""
    ends = np.cumsum([0, 8, 1, 8, 7])
    obs, _ = random_sequence(3, int(ends[-1]), B, net.features)
    start = jnp.zeros(obs.shape[:2]).at[ends[:-1]].set(1.0)
    packed, separate = net.outputs(net.stored_carry(B), obs, start), []
    for first, end in pairwise(ends):
        separate.append(net.outputs(net.initial_carry(B), obs[first:end], start[first:end]))
    return packed, np.concatenate(separate)


@pytest.mark.parametrize("arch", [*RESETTING, "mlp"])
def test_one_packed_sequence_equals_the_separate_episodes(arch):
    packed, separate = packed_and_separate(cached_net(arch))
    np.testing.assert_allclose(packed, separate, atol=1e-5)


def test_without_resets_the_state_leaks_into_the_next_episode():
    packed, separate = packed_and_separate(cached_net("s5-noreset"))
    assert np.abs(packed - separate).max(axis=(1, 2)).min() > 1e-3  # at every step


def test_memories_with_and_without_resets_agree_inside_one_episode():
    """s5-noreset is S5 in all but the reset."""
    with_resets, without = cached_net("s5"), cached_net("s5-noreset")
    obs, start = random_sequence(0, T, B, with_resets.features)
    carry = with_resets.stored_carry(B)
    nothing = jnp.zeros_like(start)
    expected = with_resets.outputs(carry, obs, nothing)
    np.testing.assert_allclose(without.outputs(carry, obs, nothing), expected, atol=1e-6)
    np.testing.assert_allclose(without.outputs(carry, obs, start), expected, atol=1e-6)
    assert np.abs(with_resets.outputs(carry, obs, start) - expected).max() > 1e-3


def test_carry_handed_from_chunk_to_chunk_equals_one_scan(net: Net):
    obs, start = random_sequence(5, T, B, net.features, 0.1)
    carry, outputs = net.stored_carry(B), []
    whole = net.outputs(carry, obs, start)
    for first, end in pairwise((0, 8, 9, 16, 24)):
        outputs.append(net.outputs(carry, obs[first:end], start[first:end]))
        carry = net.scan(net.params, carry, obs[first:end], start[first:end])[0]
    np.testing.assert_allclose(np.concatenate(outputs), whole, atol=1e-5)


def test_environments_do_not_see_each_other(net: Net):
    obs, start = random_sequence(6, T, B, net.features)
    carry, order = net.stored_carry(B), np.random.default_rng(0).permutation(B)
    shuffled = net.outputs(jax.tree.map(lambda x: x[order], carry), obs[:, order], start[:, order])
    np.testing.assert_allclose(shuffled, net.outputs(carry, obs, start)[:, order], atol=1e-5)


# ---- what an output depends on, from the Jacobian --------------------------------------------------------------------


def dependence(net, carry, obs, start):
    """One environment: bool (T, T), does the output at t depend on the observation at s; bool (T,), on the carry."""
    weight = jnp.asarray(np.random.default_rng(0).normal(size=net.module.num_actions), jnp.float32)

    def outputs(obs, carry):
        _, policy, value = net.module.apply(net.params, carry, obs, start, method="scan")
        return policy.mean[:, 0] @ weight + value[:, 0]

    to_obs, to_carry = fast_jit(jax.jacrev(outputs, (0, 1), allow_int=True))(obs, carry)
    real = [np.asarray(leaf) for leaf in jax.tree.leaves(to_carry) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    on_carry = sum([np.abs(leaf).reshape(len(leaf), -1).sum(-1) for leaf in real], np.zeros(len(start)))
    return np.abs(np.asarray(to_obs)).sum((2, 3)) > 0, on_carry > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_output_depends_on_exactly_the_episode_so_far(arch):
    """Never on a later observation and, with resets, never on the previous episode's or on the stored carry."""
    net, length = cached_net(arch, attention_window=32), 14
    start = jnp.zeros((length, 1)).at[jnp.array([4, 9])].set(1.0)
    obs, _ = random_sequence(8, length, 1, net.features)
    on_obs, on_carry = dependence(net, net.stored_carry(1), obs, start)
    now, then = np.mgrid[:length, :length]
    episode = np.cumsum(np.asarray(start)[:, 0])
    same_episode = episode[now] == episode[then]
    expected = {
        "mlp": (now == then, np.zeros(length, bool)),
        "s5-noreset": (now >= then, np.ones(length, bool)),
    }.get(arch, ((now >= then) & same_episode, episode == 0))
    np.testing.assert_array_equal(on_obs, expected[0])
    np.testing.assert_array_equal(on_carry, expected[1])


@pytest.mark.parametrize("layers", others_slow([1, 2], 2))
def test_attention_sees_its_window_and_nothing_older(layers):
    """A layer reads the last W steps, this one included; two layers reach W - 1 steps further."""
    window, length = 5, 16
    net = cached_net("attention", attention_window=window, **{} if layers == 2 else {"s5_layers": layers})
    obs, _ = random_sequence(9, length, 1, net.features)
    start = jnp.zeros((length, 1)).at[0].set(1.0)
    on_obs, _ = dependence(net, net.initial_carry(1), obs, start)
    now, then = np.mgrid[:length, :length]
    np.testing.assert_array_equal(on_obs, (now >= then) & (now - then <= layers * (window - 1)))


def test_attention_through_its_cache_equals_the_full_pass():
    """Steps from an empty cache, several times longer than the window, with and without resets."""
    net = cached_net("attention", attention_window=5)
    for reset_rate in (0.0, 0.1):
        obs, start = random_sequence(11, 40, B, net.features, reset_rate)
        carry = net.initial_carry(B)
        np.testing.assert_allclose(net.steps(carry, obs, start)[1], net.outputs(carry, obs, start), atol=1e-5)


@pytest.mark.parametrize("arch", RESETTING)
def test_memory_reaches_back_to_the_first_step_of_the_episode(arch):
    """A cue at the first step moves the output 20 steps later, by more than rounding."""
    net = cached_net(arch, attention_window=32)
    obs, _ = random_sequence(12, 21, 2, net.features)
    obs = obs.at[:, 1].set(obs[:, 0]).at[0, 1].add(3.0)
    start = jnp.zeros((21, 2)).at[0].set(1.0)
    outputs = net.outputs(net.initial_carry(2), obs, start)
    assert np.abs(outputs[-1, 0] - outputs[-1, 1]).max() > 1e-5


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("discrete", [True, False])
def test_parameters_are_real_and_the_gradient_reaches_every_one(net: Net, discrete):
    net = cached_net(net.args.arch, discrete=discrete)
    obs, start = random_sequence(13, T, B, net.features)
    carry, rng = net.stored_carry(B), np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=(T, B, net.module.num_actions)), jnp.float32)

    def loss(params):
        _, policy, value = net.module.apply(params, carry, obs, start, method="scan")
        return jnp.sum(policy.mean * weight) + jnp.sum(value * weight[..., 0]) + jnp.sum(policy.entropy())

    for path, leaf in jax.tree.leaves_with_path(fast_jit(jax.grad(loss))(net.params)):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == jnp.float32, name
        assert np.all(np.isfinite(leaf)) and np.all(np.asarray(leaf) != 0), name


def test_s5_is_initialised_as_the_paper_says():
    """HiPPO eigenvalues in every layer, time steps log-uniform in their range."""
    net = Net("s5", s5_state=64, s5_dt_min=0.001, s5_dt_max=0.1)
    leaves = {jax.tree_util.keystr(k): np.asarray(leaf) for k, leaf in jax.tree.leaves_with_path(net.initial_params)}
    normal_part = np.array([[-0.5 if i == j else 0.0 for j in range(128)] for i in range(128)])
    for i in range(128):
        for j in range(i):
            half = ((i + 0.5) * (j + 0.5)) ** 0.5
            normal_part[i, j], normal_part[j, i] = -half, half
    frequencies = np.sort(np.linalg.eigvals(normal_part).imag)[64:]
    assert sum(name.endswith("['Lambda_im']") for name in leaves) == net.args.s5_layers
    for name, leaf in leaves.items():
        if name.endswith("['Lambda_re']"):
            np.testing.assert_allclose(leaf, -0.5, atol=1e-6)
        elif name.endswith("['Lambda_im']"):
            np.testing.assert_allclose(np.sort(leaf), frequencies, rtol=1e-4)
        elif name.endswith("['log_step']"):
            assert np.all((leaf >= np.log(0.001)) & (leaf <= np.log(0.1)))
            assert abs(leaf.mean() - np.log(0.01)) < 5 * np.log(100) / np.sqrt(12 * 64)


# ---- the table of all memories ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_counts_what_each_memory_has_and_repeats_no_finished_run(tmp_path, monkeypatch):
    """RepeatPreviousHard has 6 features of input and 4 actions; the numbers are those of layers written out."""
    widths = {"encoder_layers": (16,), "decoder_layers": (16,), "s5_layers": 1, "s5_width": 16, "s5_state": 8}
    sizes = {"num_envs": 4, "num_steps": 1024, "num_minibatches": 2, "total_timesteps": 8192}
    command = ["memories", "--tasks", "RepeatHard", "--archs", "mlp", "mingru", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--", *as_flags(**widths, **sizes)])
    memories.main()
    written = [path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.csv")]
    memories.main()
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.csv")] == written and len(written) == 2
    rows = {row["arch"]: row for row in read_rows(tmp_path / "memories.csv")}
    assert len(rows) == 2

    dense = lambda inputs, outputs: inputs * outputs + outputs  # noqa: E731
    obs = popgym_jax.make("RepeatHard")[0].observation_space(None).shape[0]
    rest = dense(obs + 4 + 1, 16) + dense(16, 16) + 2 * dense(16, 16) + dense(16, 4) + dense(16, 1)
    assert int(rows["mlp"]["parameters"]) == rest + dense(16, 16)
    assert int(rows["mingru"]["parameters"]) == rest + 4 * dense(16, 16) + 2 * 16
    assert int(rows["mlp"]["memory_floats"]) == 0 and int(rows["mingru"]["memory_floats"]) == 16
