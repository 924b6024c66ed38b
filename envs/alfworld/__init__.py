"""ALFWorld: household tasks in text on the real TextWorld engine, with a drawing of what the agent faces.

Importing needs neither `alfworld` nor `textworld`; making a game or an environment does (`make setup EXTRAS=alfworld`).
"""
