"""Random bits for the environments: the numbers of `jax.random`, several times faster on a CPU.

jax compiles its generator, Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"), as a loop on CPUs. Here the rounds are written
out one after the other, which XLA fuses with the step that uses them. Block i of a key
is bit for bit the key that `jax.random.fold_in(key, i)` and
`jax.random.split(key, n)[i]` return.

All functions take one key and are meant for `jax.vmap`.
"""

import jax
import jax.numpy as jnp
import numpy as np

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
KEY_PARITY = np.uint32(0x1BD11BDA)
RESET_STREAM = 1  # blocks with this high counter word are never used by a step

Words = tuple[jax.Array, jax.Array]  # 64 bits as two uint32 arrays of one shape


def threefry(key: Words, counter: Words) -> Words:
    """Threefry-2x32-20 of counters under a key; the four arrays broadcast."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ KEY_PARITY)
    x = counter[0] + schedule[0]
    y = counter[1] + schedule[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def blocks(key: jax.Array, count: int, stream: int = 0) -> Words:
    """Blocks 0 .. count - 1 of a key, each 64 random bits: two uint32 (count,)."""
    data = jax.random.key_data(key)
    low = jnp.arange(count, dtype=jnp.uint32)
    high = jnp.full_like(low, stream)
    return threefry((data[0], data[1]), (high, low))


def bits(key: jax.Array, count: int) -> jax.Array:
    """Random 32-bit words, uint32 (count,), two from each block."""
    return jnp.concatenate(blocks(key, (count + 1) // 2))[:count]


def split(key: jax.Array, count: int) -> jax.Array:
    """Keys (count,) of the kind that came in; equal to jax.random.split(key, count)."""
    data = jnp.stack(blocks(key, count), axis=1)  # (count, 2)
    # the barrier keeps XLA from computing a key again in each operation that uses it
    return _as_keys(key, jax.lax.optimization_barrier(data))


def reset_key(key: jax.Array) -> jax.Array:
    """The key of the episode that begins after this step, which itself never draws from it."""
    x, y = blocks(key, 1, RESET_STREAM)
    return _as_keys(key, jnp.concatenate([x, y]))


def _as_keys(key: jax.Array, data: jax.Array) -> jax.Array:
    """uint32 (..., 2) as keys like `key`: typed if it is, the words repeated if it has 4."""
    width = jax.random.key_data(key).shape[-1]
    repeated = jnp.concatenate([data] * (width // 2), axis=-1)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return repeated
    return jax.random.wrap_key_data(repeated, impl=jax.random.key_impl(key))


def uniform(words: jax.Array, low: float = 0.0, high: float = 1.0) -> jax.Array:
    """Uniform float32 in [low, high) from uint32; any shape.

    The 23 high bits become the mantissa of a number in [1, 2): one of 2^23 equidistant values.
    """
    one_to_two = (words >> 9) | np.uint32(0x3F800000)
    unit = jax.lax.bitcast_convert_type(one_to_two, jnp.float32) - 1.0
    return jnp.maximum(unit * (high - low) + low, low)


def normal(words: jax.Array) -> jax.Array:
    """Standard normal float32 from uint32, by the inverse of its distribution; any shape."""
    low = float(np.nextafter(np.float32(-1.0), np.float32(0.0)))
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform(words, low, 1.0))


def integer(words: jax.Array, bound: int | jax.Array) -> jax.Array:
    """Uniform int32 in [0, bound) from uint32, for 1 <= bound <= 65536; shapes broadcast.

    floor(words bound / 2^32), in 32-bit arithmetic by halves; no value is favoured by
    more than bound / 2^32 of its share.
    """
    bound = jnp.asarray(bound).astype(jnp.uint32)
    high = words >> 16
    low = words & np.uint32(0xFFFF)
    carried = (low * bound) >> 16
    return ((high * bound + carried) >> 16).astype(jnp.int32)
