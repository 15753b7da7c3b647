"""AutoGen: agents and teams of AgentChat as handlers.

AgentChat (autogen-agentchat 0.7) treats a run as follows:

- Agents, teams and termination conditions keep their conversation from run to run, and a team runs once at a time. So
  each run has a copy (`AgentCopies`) of what was registered, with the model clients and tools of the original.
- A cancelled team goes on until its conversation ends, because it waits for its runtime. Cancelled by its
  ``CancellationToken``, an agent never returns from a tool. So a run has a token, and its tasks are cancelled as well
  (`AgentRun`): it stops at once, and leaves none of them.
- A plain tool runs in the event loop's default executor, without context variables, and cancelling leaves its thread
  running. In a copy it runs in an `AgentThread`: with them, and its run ends when it does.
- A team turns an exception into the text of a RuntimeError; the exception itself is raised here. An exception of a tool
  is its result, which the model reads.
- AgentChat retries no call; an unbound client of OpenAI's makes two retries of its own.
- Usage is in the messages of agents. That of a team's selector or orchestrator is not in any.
"""

from forebay.adapters.autogen.handler import handler

__all__ = ["handler"]
