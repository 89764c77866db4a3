"""What runs left behind as lines of text; on the driver."""

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.dataset.cache import age_in_seconds, clear, leftovers
from orpo_ray.runs.formatting import format_duration
from orpo_ray.storage.files import one_line
from orpo_ray.storage.folder import Folder
from orpo_ray.storage.hiding import printable
from orpo_ray.storage.scratch import copies_root


def show_cache(config: ORPOConfig, older_than: str | None) -> None:
    """Print what runs of a config left behind, or delete what of it is old and print that.

    Args:
        config: names the output directory and the token cache.
        older_than: `older_than=30d` or `30d`; None to delete nothing.

    Raises:
        ConfigError: for what is no age, and for a folder that cannot be read.
    """
    output = Folder.at(config.output.output_dir)
    cache = Folder.at(config.data.token_cache_dir or f"{output}/token_cache")
    try:
        age_s = None
        if older_than is not None:
            age_s = age_in_seconds(older_than.removeprefix("older_than="))
        found = leftovers(output, cache, Folder(copies_root()))
        if age_s is not None:
            found = clear(found, age_s)
    except ValueError as error:
        raise ConfigError([f"--clear-cache: {error}"]) from error
    except OSError as error:
        raise ConfigError([f"{output}: cannot be read: {one_line(error)}"]) from error
    for one in found:
        size, age = f"{one.size_bytes / 1e6:9.1f} MB", f"{format_duration(one.age_s)} old"
        print(printable(f"{one.kind:18}  {one.folder}/{one.name}  {size}  {age}"))
    total = sum(one.size_bytes for one in found) / 1e6
    print(f"{len(found)} of {total:.1f} MB" + (" deleted" if older_than is not None else ""))
