// Shows /v1/openapi.json. Every text is set as text, never as markup.
"use strict";

const make = (tag, text, kind) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};

const table = (rows) => {
  const body = make("table");
  for (const row of rows) {
    const line = make("tr");
    for (const cell of row) line.append(make("td", cell));
    body.append(line);
  }
  return body;
};

const schemaName = (schema) => {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.type === "array") return schemaName(schema.items) + "[]";
  return Array.isArray(schema.type) ? schema.type.join(" | ") : schema.type || "any";
};

const operation = (path, method, spec) => {
  const box = make("details");
  const head = make("summary");
  head.append(make("span", method, "method"), make("code", path), make("span", " " + (spec.summary || "")));
  box.append(head);
  if (spec.description) box.append(make("p", spec.description));
  const parameters = spec.parameters || [];
  if (parameters.length) {
    box.append(make("h4", "Parameters"));
    box.append(table(parameters.map((p) => [p.name, p.in, schemaName(p.schema), p.description || ""])));
  }
  const content = spec.requestBody && spec.requestBody.content;
  if (content) {
    box.append(make("h4", "Body"));
    box.append(table(Object.entries(content).map(([kind, body]) => [kind, schemaName(body.schema)])));
  }
  box.append(make("h4", "Answers"));
  box.append(table(Object.entries(spec.responses || {}).map(([status, answer]) => [
    status,
    answer.description || "",
    Object.values(answer.content || {}).map((body) => schemaName(body.schema)).join(", "),
  ])));
  return box;
};

const show = (api) => {
  const page = document.getElementById("page");
  page.replaceChildren(make("h1", api.info.title + " API"), make("p", api.info.description));
  for (const [path, item] of Object.entries(api.paths)) {
    for (const [method, spec] of Object.entries(item)) page.append(operation(path, method, spec));
  }
  page.append(make("h2", "Schemas"));
  for (const [name, schema] of Object.entries(api.components.schemas || {})) {
    const box = make("details");
    box.append(make("summary", name));
    box.append(make("pre", JSON.stringify(schema, null, 2)));
    page.append(box);
  }
};

fetch("/v1/openapi.json").then((answer) => answer.json()).then(show).catch(() => {
  document.getElementById("page").textContent = "The document could not be read.";
});
