"""Distances of line segments in the plane: two capsules touch where their segments are near."""

import jax
import jax.numpy as jnp


def point_to_segment(point: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Distance () of a point (2,) to the segment from a to b, (2,) each."""
    along = b - a
    place = jnp.clip(jnp.dot(point - a, along) / jnp.dot(along, along), 0.0, 1.0)
    return jnp.linalg.norm(point - a - place * along)


def side_of(point: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Positive on the left of the line from a to b, negative on its right, ()."""
    along = b - a
    to_point = point - a
    return along[0] * to_point[1] - along[1] * to_point[0]


def segment_to_segment(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> jax.Array:
    """Distance () of the segments from a to b and from c to d, (2,) each; 0 if they cross."""
    to_cd = jnp.minimum(point_to_segment(a, c, d), point_to_segment(b, c, d))
    to_ab = jnp.minimum(point_to_segment(c, a, b), point_to_segment(d, a, b))
    parted_by_cd = side_of(a, c, d) * side_of(b, c, d) < 0.0
    parted_by_ab = side_of(c, a, b) * side_of(d, a, b) < 0.0
    return jnp.where(parted_by_cd & parted_by_ab, 0.0, jnp.minimum(to_cd, to_ab))
