"""POPGym (Morad et al. 2023) in pure JAX with the gymnax 1.x API: `env, params = make(name)`."""

from typing import TYPE_CHECKING, Any

from popgym_jax.random_projection import RandomProjection
from popgym_jax.registration import UnknownEnvironmentError, make, meta_envs, registered_envs
from popgym_jax.trials import Trials
from popgym_jax.wrappers import EpisodeStatistics, PreviousActionAndStart

if TYPE_CHECKING:
    from popgym_jax.gymnasium_view import to_gymnasium, to_gymnasium_vector

__all__ = [
    "EpisodeStatistics",
    "PreviousActionAndStart",
    "RandomProjection",
    "Trials",
    "UnknownEnvironmentError",
    "make",
    "meta_envs",
    "registered_envs",
    "to_gymnasium",
    "to_gymnasium_vector",
]


def __getattr__(name: str) -> Any:
    """The views for gymnasium, which is imported when one of them is first used."""
    if name not in ("to_gymnasium", "to_gymnasium_vector"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from popgym_jax import gymnasium_view
    except ImportError as error:
        raise ImportError(
            f"{name} needs gymnasium 1.1 or newer: pip install 'popgym-jax[gymnasium]' ({error})"
        ) from error
    return getattr(gymnasium_view, name)
