"""POPGym (Morad et al. 2023) in pure JAX with the gymnax 1.x API: `env, params = make(name)`."""

from popgym_jax.registration import UnknownEnvironmentError, make, registered_envs

__all__ = ["UnknownEnvironmentError", "make", "registered_envs"]
