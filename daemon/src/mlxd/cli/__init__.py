"""The `mlxd` command: a client like any other, that happens to ship with the daemon.

Nothing heavy is imported before a command needs it: `mlxd --help` and the commands that only talk to the socket load
neither rich nor asyncio, let alone anything of MLX.
"""
