// What has been said: turns that are settled, and the latest one, whose answers are compared.

import { element } from "./format.js";
import { rendered } from "./markdown.js";

export class Conversation {
  // `list`: where it is shown.
  constructor(list) {
    Object.assign(this, { list, turns: [], latest: null });
  }

  // The latest turn's answer that the conversation goes on with, if there is any.
  get kept() {
    const done = this.latest?.lanes.filter((lane) => lane.isDone) ?? [];
    return done.find((lane) => lane.radio.checked) ?? done.at(-1) ?? null;
  }

  // What a model is asked: `prompt`, or with none the latest question again.
  messages(system, prompt) {
    const turns = this.turns.flatMap(({ user, answer }) => [{ role: "user", content: user }, { role: "assistant", content: answer }]);
    if (prompt && this.kept) turns.push({ role: "user", content: this.latest.user }, { role: "assistant", content: this.kept.answer });
    return [...(system ? [{ role: "system", content: system }] : []), ...turns, { role: "user", content: prompt || this.latest?.user || "" }];
  }

  // A new question settles the one before. A question that nobody answered is forgotten.
  ask(user, lanes) {
    const kept = this.kept;
    if (kept) this.turns.push({ user: this.latest.user, answer: kept.answer, name: kept.servedAs ?? kept.name });
    this.latest = { user, lanes };
    this.show();
  }

  askAgain(lanes) { this.latest.lanes = lanes; }

  clear() {
    Object.assign(this, { turns: [], latest: null });
    this.show();
  }

  show() {
    const said = (who, ...content) => element("li", {}, element("strong", {}, who), element("div", {}, ...content));
    const items = this.turns.flatMap(({ user, answer, name }) => [said("You", user), said(name, rendered(answer))]);
    if (this.latest) items.push(said("You", this.latest.user));
    this.list.replaceChildren(...items);
    this.list.hidden = items.length === 0;
    this.list.scrollTop = this.list.scrollHeight;
  }
}
