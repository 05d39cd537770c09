"""The daemon's decisions, pure: events and the time come in, actions go out.

Nothing here may import asyncio, os, time or logging, or touch the world in any other way.
"""
