"""A test double of the Kubernetes API with a Job controller and one kubelet that runs containers as local processes.

schema.py       what an object must look like: unknown fields, required fields, defaults, immutable fields (1.33)
store.py        the objects, their versions, and who watches them
container.py    a container as processes of this machine, in a pid namespace of their own where that is allowed
kubelet.py      pods: scheduling, phases, conditions, logs, termination, lost nodes
jobs.py         the Job controller, and the garbage collector
server.py       HTTP: routes, users and their roles, the log of requests, faults to order
cluster.py      for tests: start and stop it, kubeconfigs, faults; or the same for a real cluster
"""
