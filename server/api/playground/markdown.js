// Markdown of a model as nodes. What a model writes is untrusted: only these elements survive, and nothing loads.

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong", "sub", "sup",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

// HTML that a model writes is shown as it wrote it; of a picture, the words that stand for it.
const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
marked.use({ gfm: true, breaks: true, renderer: { html: ({ text }) => escaped(text), image: ({ text }) => escaped(text) } });

// The page has a heading of its own for each answer: those within are paragraphs to a screen reader's outline.
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (/^H[1-6]$/.test(node.nodeName)) node.setAttribute("role", "presentation");
  if (node.nodeName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

export const rendered = (text) => DOMPurify.sanitize(marked.parse(text), ALLOWED);
