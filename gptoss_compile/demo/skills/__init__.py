"""What the demo model can do: one generator of exchanges a skill, all text our own.

A generator takes a random.Random and an effort and returns (exchanges, expected): see `Conversation`.
"""
