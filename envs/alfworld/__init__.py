"""ALFWorld: text household tasks on the real TextWorld engine, with a drawing of what the agent sees.

Importing needs neither `alfworld` nor `textworld`; making a game or an environment does (`make setup EXTRAS=alfworld`).
"""
