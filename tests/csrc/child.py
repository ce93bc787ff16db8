"""One call of the emulated extension: a request from standard input, as emulated.call writes it; JSON both ways.

A process of its own: a crash is a message, and builds of one extension cannot share a process.
"""

import ctypes
import importlib.util
import json
import mmap
import sys


def allocate(library: ctypes.CDLL, name: str, address: int, size: int, *, writable: bool, is_written: bool) -> None:
    """Announce memory to the emulator; a kernel may touch no other."""
    kinds = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool, ctypes.c_bool]
    library.emulator_allocate.argtypes = kinds
    library.emulator_allocate(name.encode(), address, size, writable, is_written)


def bank_conflicts(library: ctypes.CDLL) -> list[tuple[int, int]]:
    """Each place in the code that accesses shared memory, with the most ways of a conflict there."""
    found: list[tuple[int, int]] = []
    library.emulator_bank_conflicts(ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.c_int)(lambda *of: found.append(of)))
    return found


def main() -> None:
    request = json.load(sys.stdin)
    library = ctypes.CDLL(request["library"])
    specification = importlib.util.spec_from_file_location("_cuda", request["library"])
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    library.emulator_seed(request["seed"])
    addresses, maps = {}, []
    for name, file, offset, size, writable, is_written in request["allocations"]:
        with open(file, "r+b") as opened:
            maps.append(mmap.mmap(opened.fileno(), 0))
        addresses[file] = ctypes.addressof(ctypes.c_char.from_buffer(maps[-1])) + offset
        allocate(library, name, addresses[file], size, writable=writable, is_written=is_written)

    arguments = request["arguments"] | {name: addresses[file] for name, file in request["pointers"].items()}
    if "dtype" in arguments:
        arguments["dtype"] = getattr(module.DType, arguments["dtype"])
    try:
        value = getattr(module, request["function"])(**arguments)
    except RuntimeError as error:
        answer = {"fault": str(error)}
    else:
        answer = {"value": value, "conflicts": bank_conflicts(library)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
