"""A test double of the Kubernetes API with a Job controller and a kubelet that runs containers as local processes.

It does what the worker, the training's Job and the tests of both need, in one namespace, and nothing else.

store.py       the objects, their versions, and who watches them
kubelet.py     pods: a container as processes, phases, termination, lost nodes
jobs.py        the Job controller, and what a Job and its pods must look like
api.py         HTTP: routes, the worker's role, the log of requests
cluster.py     for tests: what they see of the double, and faults to order
platform.py    for tests: preflow on that cluster
"""
