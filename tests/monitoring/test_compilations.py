import threading

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from mmrecoder_jax.monitoring.compilations import Compilations
from mmrecoder_jax.monitoring.progress import Progress


def fresh(number):
    """A function that no other test has compiled."""
    return jax.jit(lambda x: x * number + 0.5)


def test_compilations_are_booked_on_the_phase_that_is_open():
    x = jax.block_until_ready(jnp.ones(3))
    with Progress("stage1", 2) as progress, Compilations(lambda: progress.open_phase) as counted:
        first, second, third = fresh(41), fresh(42), fresh(43)
        with progress.phase("decode"):
            first(x)
            with progress.phase("execute"):
                second(x)
            first(x)
            beside = threading.Thread(target=third, args=(x,))
            beside.start()
            beside.join()
        fresh(44)(x)
        found = counted.taken()
        assert found.pop("compiles/seconds") > 0
        assert found == {"compiles/decode": 2, "compiles/execute": 1, "compiles/other": 1}
        with progress.phase("decode"):
            first(x)
        assert counted.taken() == {}
    fresh(45)(x)
    assert counted.taken() == {}  # nobody listens any more


def test_a_program_from_the_persistent_cache_was_not_compiled(tmp_path):
    """Its file is there from before; the second of two equal functions reads it."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    x = jax.block_until_ready(jnp.ones(5))
    try:
        for name, value in names.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        with Compilations(lambda: "update") as counted:
            fresh(46)(x)
            assert counted.taken().pop("compiles/update") == 1
            fresh(46)(x)
            assert counted.taken() == {"compiles/cached": 1}
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
