"""The networks of ADM and IDDPM, and their attention: recorded, replaced. Know nothing of guidance."""
