"""State-space numerics: HiPPO, its diagonalisation, discretisation, the reset operator and the fast recurrence."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from conftest import fast_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

import s5_common as common
from s5_common import reset_operator

FORMS = {
    "chosen": common.linear_recurrence,
    "sequential": partial(common._scan_sequential, False),
    "parallel": partial(common._scan_parallel, False),
}


# ---- HiPPO and its diagonalisation -----------------------------------------------------------------------------------


def hippo_by_loops(n):
    """HiPPO-LegS as published: Gu et al. 2020."""
    A = np.zeros((n, n))
    for i in range(n):
        A[i, i] = -(i + 1)
        for j in range(i):
            A[i, j] = -((2 * i + 1) ** 0.5) * ((2 * j + 1) ** 0.5)
    return A


@pytest.mark.parametrize("n", [2, 6, 64, 256])
def test_eigenpairs_and_their_conjugates_rebuild_the_hippo_matrix(n):
    """A = V Lambda V^H - p p^T with both halves of the spectrum, V unitary, Re(Lambda) = -1/2."""
    Lambda, V = common.dplr_hippo(n)
    assert Lambda.shape == (n // 2,) and V.shape == (n, n // 2)
    np.testing.assert_allclose(Lambda.real, -0.5, atol=1e-10)
    assert np.all(Lambda.imag > 0)
    both, values = np.concatenate([V, V.conj()], axis=1), np.concatenate([Lambda, Lambda.conj()])
    np.testing.assert_allclose(both.conj().T @ both, np.eye(n), atol=1e-9)
    low_rank = np.sqrt(np.arange(n) + 0.5)
    rebuilt = both @ np.diag(values) @ both.conj().T - np.outer(low_rank, low_rank)
    np.testing.assert_allclose(rebuilt, hippo_by_loops(n), atol=1e-9 * n)


@pytest.mark.parametrize("seed", range(3))
def test_zero_order_hold_equals_the_matrix_exponential(seed):
    """exp([[Lambda, B], [0, 0]] step) holds Lambda_bar above left and B_bar above right."""
    rng = np.random.default_rng(seed)
    P, H = 6, 3
    Lambda = -rng.uniform(0.1, 2, P) + 1j * rng.uniform(-10, 10, P)
    B, step = rng.normal(size=(P, H)) + 1j * rng.normal(size=(P, H)), rng.uniform(0.001, 0.3, P)
    got_A, got_B = common.discretize_zoh(jnp.asarray(Lambda), jnp.asarray(B), jnp.asarray(step))
    for p in range(P):
        augmented = np.zeros((1 + H, 1 + H), complex)
        augmented[0, 0], augmented[0, 1:] = Lambda[p], B[p]
        expected = scipy.linalg.expm(augmented * step[p])
        np.testing.assert_allclose(got_A[p], expected[0, 0], rtol=1e-5)
        np.testing.assert_allclose(got_B[p], expected[0, 1:], rtol=2e-3, atol=1e-5)


def test_zero_order_hold_of_the_diagonal_system_equals_that_of_the_full_one():
    """A full real system held for a step and its diagonal form move a state to the same place."""
    n, step = 8, 0.05
    Lambda, V = common.dplr_hippo(n)
    low_rank = np.sqrt(np.arange(n) + 0.5)
    rng = np.random.default_rng(0)
    B, x, u = rng.normal(size=(n, 2)), rng.normal(size=n), rng.normal(size=2)
    augmented = np.zeros((n + 2, n + 2))
    augmented[:n, :n], augmented[:n, n:] = hippo_by_loops(n) + np.outer(low_rank, low_rank), B
    expected = (scipy.linalg.expm(augmented * step) @ np.concatenate([x, u]))[:n]
    Lambda_bar, B_bar = common.discretize_zoh(Lambda, V.conj().T @ B, jnp.full(n // 2, step))
    got = 2 * (V @ (np.asarray(Lambda_bar) * (V.conj().T @ x) + np.asarray(B_bar) @ u)).real
    np.testing.assert_allclose(got, expected, atol=1e-4)


# ---- the reset operator ----------------------------------------------------------------------------------------------


complex_numbers = st.builds(complex, st.floats(-2, 2), st.floats(-2, 2))
elements = st.builds(
    lambda a, u, d: (jnp.array([a], jnp.complex64), jnp.array([u], jnp.complex64), jnp.array([d])),
    complex_numbers,
    complex_numbers,
    st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(elements, elements, elements)
def test_reset_operator_is_associative(a, b, c):
    left, right = reset_operator(reset_operator(a, b), c), reset_operator(a, reset_operator(b, c))
    for got, expected in zip(left, right, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(elements, elements)
def test_a_reset_on_the_right_forgets_everything_on_the_left(a, b):
    b = (*b[:2], jnp.array([True]))
    jax.tree.map(np.testing.assert_array_equal, reset_operator(a, b), b)


def test_the_worked_example_of_the_docstring():
    drive, reset = [8.0, 4.0, 2.0, 6.0, 1.0], [False, False, False, True, False]
    line = jnp.full((5, 1), 0.5 + 0j), jnp.array(drive, jnp.complex64)[:, None], jnp.array(reset)[:, None]
    states = lax.associative_scan(reset_operator, line)[1]
    np.testing.assert_allclose(states[:, 0], [8, 8, 6, 6, 4])


# ---- the fast recurrence ---------------------------------------------------------------------------------------------


def random_problem(seed, T=37, B=4, P=5, reset_rate=0.15, dtype=np.float32):
    """Lambda_bar (2P,), drive (T, B, 2P), keep (T, B), carry (B, 2P); a reset at step 0 in some environments."""
    rng = np.random.default_rng(seed)
    Lambda_bar = rng.uniform(0.8, 1.0, P) * np.exp(1j * rng.uniform(-1, 1, P))
    keep = 1.0 - (rng.random((T, B)) < reset_rate)
    keep[0] = np.arange(B) % 2
    packed = np.concatenate([Lambda_bar.real, Lambda_bar.imag])
    problem = packed, rng.normal(size=(T, B, 2 * P)), keep, rng.normal(size=(B, 2 * P))
    return tuple(jnp.asarray(x, dtype) for x in problem)


def loop(Lambda_bar, drive, keep, carry):
    """The recurrence in complex numpy, one step and one environment after the other."""
    Lambda_bar, drive, keep, carry = (np.asarray(x, np.float64) for x in (Lambda_bar, drive, keep, carry))
    P = len(Lambda_bar) // 2
    Lambda_bar = Lambda_bar[:P] + 1j * Lambda_bar[P:]
    states = np.zeros_like(drive)
    for b in range(drive.shape[1]):
        x = carry[b, :P] + 1j * carry[b, P:]
        for t in range(len(drive)):
            if keep[t, b] == 0:
                x = np.zeros(P, complex)
            x = Lambda_bar * x + drive[t, b, :P] + 1j * drive[t, b, P:]
            states[t, b] = np.concatenate([x.real, x.imag])
    return states


def definition(Lambda_bar, drive, keep, carry):
    """The paper's form: a scan with the reset operator, the carry prepended as an element of its own."""
    T, B = keep.shape
    transition = jnp.broadcast_to(common.packed_to_complex(Lambda_bar), (T + 1, B, len(Lambda_bar) // 2))
    drive = common.packed_to_complex(jnp.concatenate([carry[None], drive]))
    reset = jnp.concatenate([jnp.zeros((1, B), bool), keep == 0])[..., None]
    states = lax.associative_scan(reset_operator, (transition, drive, reset))[1][1:]
    return common.complex_to_packed(states)


jitted = cache(fast_jit)


def test_packing_is_lossless():
    z = jnp.array([[1 + 2j, 3 - 4j]])
    np.testing.assert_array_equal(common.complex_to_packed(z), [[1, 3, 2, -4]])
    np.testing.assert_array_equal(common.packed_to_complex(common.complex_to_packed(z)), z)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_recurrence_equals_the_reset_operator_scan_and_a_plain_loop(form, seed):
    problem = random_problem(seed)
    states = jitted(FORMS[form])(*problem)
    np.testing.assert_allclose(states, loop(*problem), atol=2e-5)
    np.testing.assert_allclose(states, jitted(definition)(*problem), atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2])
def test_recurrence_of_the_shortest_sequences(form, T):
    problem = random_problem(0, T=T)
    np.testing.assert_allclose(jitted(FORMS[form])(*problem), loop(*problem), atol=1e-5)


def test_one_step_equals_the_scan_of_one_step():
    Lambda_bar, drive, keep, carry = random_problem(4, T=1)
    x = common.recurrence_step(Lambda_bar, carry, drive[0], keep[0])
    np.testing.assert_allclose(x, loop(Lambda_bar, drive, keep, carry)[0], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_reverse_scan_is_the_scan_of_the_reversed_sequence(form):
    if form == "chosen":
        scan = common._scan
    else:
        scan = partial({"sequential": common._scan_sequential, "parallel": common._scan_parallel}[form], True)
    Lambda_bar, drive, keep, carry = random_problem(5)
    options = {"reverse": True} if form == "chosen" else {}
    backwards = fast_jit(partial(scan, **options))(Lambda_bar, drive[::-1], keep[::-1], carry)
    np.testing.assert_allclose(backwards[::-1], loop(Lambda_bar, drive, keep, carry), atol=2e-5)


@cache
def gradients(function):
    """Of a loss that weighs every state differently, with respect to Lambda_bar, drive and carry."""

    def loss(Lambda_bar, drive, keep, carry):
        weight = jnp.cos(jnp.arange(drive.size, dtype=drive.dtype)).reshape(drive.shape)
        return jnp.sum(weight * jnp.sin(function(Lambda_bar, drive, keep, carry)))

    return fast_jit(jax.grad(loss, (0, 1, 3)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_of_the_reset_operator_scan(form, seed):
    """With respect to the transition, the drive and the stored carry; in float64, so the tolerance is tight."""
    with jax.enable_x64(True):
        problem = random_problem(seed, T=23, dtype=np.float64)
        for got, expected in zip(gradients(FORMS[form])(*problem), gradients(definition)(*problem), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        Lambda_bar, drive, keep, carry = random_problem(1, T=7, B=2, P=2, dtype=np.float64)
        function = lambda a, u, x: common.linear_recurrence(a, u, keep, x)  # noqa: E731
        check_grads(function, (Lambda_bar, drive, carry), order=1, modes=["rev"], eps=1e-5)


def test_no_gradient_crosses_a_reset():
    Lambda_bar, drive, keep, carry = random_problem(0, T=6, B=1)
    keep = jnp.ones_like(keep).at[3].set(0.0)

    def last(drive, carry):
        return jnp.sum(common.linear_recurrence(Lambda_bar, drive, keep, carry)[-1])

    d_drive, d_carry = jax.grad(last, (0, 1))(drive, carry)
    assert np.all(np.asarray(d_drive[:3]) == 0) and np.all(np.asarray(d_carry) == 0)
    assert np.all(np.asarray(d_drive[3:]) != 0)


@pytest.mark.parametrize("platform, loops", [("cpu", True), ("cuda", False), ("tpu", False)])
@pytest.mark.parametrize("direction", ["forward", "gradient"])
def test_a_loop_over_time_on_cpu_and_none_on_accelerators(platform, loops, direction):
    def gradient(*problem):
        return jax.grad(lambda *p: jnp.sum(common.linear_recurrence(*p)), (0, 1, 3))(*problem)

    function = common.linear_recurrence if direction == "forward" else gradient
    lowered = jax.jit(function).trace(*random_problem(0)).lower(lowering_platforms=(platform,))
    assert ("stablehlo.while" in lowered.as_text()) == loops


# ---- the recurrence with a transition that depends on the input ------------------------------------------------------
GATED_FORMS = {
    "chosen": common.gated_recurrence,
    "sequential": partial(common._gated_sequential, False),
    "parallel": partial(common._gated_parallel, False),
}


def gated_problem(seed, T=19, B=3, H=4, dtype=np.float32):
    """Gates, some of them 0 as where an episode opens, drive and carry."""
    rng = np.random.default_rng(seed)
    gate = rng.uniform(0, 1, (T, B, H)) * (rng.random((T, B, 1)) > 0.2)
    arrays = gate, rng.normal(size=(T, B, H)), rng.normal(size=(B, H))
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def gated_loop(gate, drive, carry):
    states = []
    for now_gate, now_drive in zip(gate, drive, strict=True):
        carry = now_gate * carry + now_drive
        states.append(carry)
    return jnp.stack(states)


@pytest.mark.parametrize("T", [1, 2, 19])
@pytest.mark.parametrize("form", GATED_FORMS)
def test_gated_recurrence_equals_a_plain_loop(form, T):
    problem = gated_problem(T, T=T)
    np.testing.assert_allclose(fast_jit(GATED_FORMS[form])(*problem), gated_loop(*problem), atol=1e-6)


@pytest.mark.parametrize("form", GATED_FORMS)
def test_gradients_of_the_gated_recurrence_equal_those_of_a_plain_loop(form):
    """Autodiff through the loop; for the gates, the drive and the carry."""

    def gradients(function, problem):
        loss = lambda *p: jnp.sum(jnp.sin(3 * function(*p)))  # noqa: E731
        return fast_jit(jax.grad(loss, (0, 1, 2)))(*problem)

    with jax.enable_x64(True):
        problem = gated_problem(0, T=7, dtype=np.float64)
        for got, expected in zip(gradients(GATED_FORMS[form], problem), gradients(gated_loop, problem), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("platform, loops", [("cpu", True), ("cuda", False), ("tpu", False)])
def test_the_gated_recurrence_loops_on_cpu_alone(platform, loops):
    lowered = jax.jit(common.gated_recurrence).trace(*gated_problem(0)).lower(lowering_platforms=(platform,))
    assert ("stablehlo.while" in lowered.as_text()) == loops


# ---- the layers that take S5's place on it ---------------------------------------------------------------------------
def of_one_layer(layer, T=9, B=2, H=6):
    """Random parameters, carry, input and starts, and what the layer makes of them."""
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    u = jax.random.normal(keys[0], (T, B, H), jnp.float32)
    start = jnp.zeros((T, B), jnp.float32).at[4, 1].set(1.0)
    carry = jax.random.normal(keys[1], layer.initial_carry(B).shape, jnp.float32)
    params = layer.init(keys[2], carry, u, start, method="scan")
    _, out = layer.apply(params, carry, u, start, method="scan")
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    return params, np.asarray(carry, np.float64), np.asarray(u, np.float64), np.asarray(start), np.asarray(out)


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def gated_output(params, u, y):
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return u + dense(params["value"], y) * sigmoid(dense(params["gate"], y))


def test_lru_equals_its_equations_with_complex_numbers():
    P = 5
    params, carry, u, start, out = of_one_layer(common.LRU(width=6, states=P, dt_min=0.01, dt_max=0.1))
    Lambda = np.exp(-np.exp(params["nu"]) + 1j * np.exp(params["theta"]))
    gamma = np.sqrt(1 - np.abs(Lambda) ** 2)
    B = params["B"][:, :P] + 1j * params["B"][:, P:]
    C = params["C"][:P] - 1j * params["C"][P:]
    x = carry[:, :P] + 1j * carry[:, P:]
    v = normalised(u)
    for t in range(len(u)):
        x = (1 - start[t])[:, None] * Lambda * x + gamma * (v[t] @ B)
        y = (x @ C).real + params["D"] * v[t]
        np.testing.assert_allclose(out[t], gated_output(params["out"], u[t], y), atol=2e-5)
    assert np.all((np.abs(Lambda) > np.exp(-0.05)) & (np.abs(Lambda) < np.exp(-0.005)))


def test_mingru_equals_its_equations():
    params, x, u, start, out = of_one_layer(common.MinGRU(width=6, dt_min=0.01, dt_max=0.1))
    v = normalised(u)
    for t in range(len(u)):
        z = sigmoid(dense(params["update"], v[t]))
        x = (1 - start[t])[:, None] * (1 - z) * x + z * dense(params["candidate"], v[t])
        np.testing.assert_allclose(out[t], gated_output(params["out"], u[t], x), atol=2e-5)
    z = sigmoid(params["update"]["bias"])
    assert np.all((z > 0.0099) & (z < 0.1001))
