"""The networks of ADM, IDDPM and DiT, and their attention: recorded, replaced. Know nothing of guidance."""
