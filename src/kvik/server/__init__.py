"""`kvik serve`: an engine behind OpenAI's HTTP interface.

gate ─► app ─► asks, prompts, tools ─► desk ═══ engine's thread        (desk: the only meeting place)
               chat, completions ◄─ updates ─┘
"""
