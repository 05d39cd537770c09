"""The daemon's side of the socket: listening, peer check, one session per connection, method table, subscriptions.

Bytes become calls on a `Runtime` (runtime_api.py) and its answers become bytes. No decision about models is taken here.
"""
