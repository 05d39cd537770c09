"""mlxd as a service of the user: what launchd and systemd are given, and how they are told.

    spec      what is to be installed: the command, the folder, the socket, the environment
    systemd   a socket unit and a service unit for `systemd --user`
    launchd   a property list for launchd's gui domain
    manager   what both can do; picks the one of this platform

Runs in the `mlxd service` command, never in the daemon.
"""
