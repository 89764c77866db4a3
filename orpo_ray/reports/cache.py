"""The token cache as lines of text; on the driver."""

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.dataset.cache import age_in_seconds, cached_sets, clear_cache
from orpo_ray.runs.formatting import format_duration
from orpo_ray.storage.files import one_line
from orpo_ray.storage.folder import Folder


def show_cache(config: ORPOConfig, clear: str | None) -> None:
    """Print the token sets in the cache of a config, or delete the old ones and print those.

    Args:
        config: names the cache.
        clear: `older_than=30d` or `30d`; None to delete nothing.

    Raises:
        ConfigError: for what is no age, and for a cache that cannot be read.
    """
    cache = Folder.at(config.data.token_cache_dir or f"{config.output.output_dir}/token_cache")
    try:
        if clear is None:
            found = cached_sets(cache)
        else:
            found = clear_cache(cache, age_in_seconds(clear.removeprefix("older_than=")))
    except ValueError as error:
        raise ConfigError([f"--clear-cache: {error}"]) from error
    except OSError as error:
        raise ConfigError([f"{cache}: cannot be read: {one_line(error)}"]) from error
    for one in found:
        print(f"{one.name}  {one.size_bytes / 1e6:9.1f} MB  {format_duration(one.age_s)} old")
    what = "in" if clear is None else "deleted from"
    total = sum(one.size_bytes for one in found) / 1e6
    print(f"{len(found)} token sets of {total:.1f} MB {what} {cache}")
