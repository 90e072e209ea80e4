"""Rules, a module for each family of them: `RULES` lists what it offers. The folder is the registry."""
