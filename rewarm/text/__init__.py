"""From files to tokens: formats, chat templates, tokenisation, and what of it is learnt."""
