"""placeholder until the breaker lands"""


class Breaker:
    retry_at = None

    def died(self, now): ...
    def succeeded(self, now): ...
    def reset(self): ...
    def state(self, now):
        return "closed"
