//! `GET /doc`: the OpenAPI description has every route, and every reply matches it.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::support::{Host, Reply};

/// The description, with a checker for the part of JSON Schema that the description uses.
struct Doc(Value);

impl Doc {
    fn of(host: &Host) -> Doc {
        Doc(host.http("GET", "/doc").send().json())
    }

    fn resolve<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value["$ref"].as_str() {
            Some(at) => self.0.pointer(at.strip_prefix('#').unwrap()).unwrap_or_else(|| panic!("nothing at {at}")),
            None => value,
        }
    }

    /// The schema of the reply to a request.
    fn reply(&self, path: &str, method: &str, status: u16) -> &Value {
        let responses = &self.0["paths"][path][method]["responses"];
        let of_status = &responses[status.to_string()];
        let response = self.resolve(if of_status.is_null() { &responses["default"] } else { of_status });
        let content = response["content"].as_object().unwrap_or_else(|| panic!("{method} {path} {status}"));
        self.resolve(&content.values().next().unwrap()["schema"])
    }

    /// Checks a value against a schema. Fields that the schema does not describe are errors.
    fn check(&self, schema: &Value, value: &Value) -> Result<(), String> {
        let schema = self.resolve(schema);
        let wrong = |what: &str| Err(format!("{what}: {value} by {schema}"));
        if let Some(alternatives) = schema["oneOf"].as_array() {
            let fits = alternatives.iter().filter(|one| self.check(one, value).is_ok()).count();
            return if fits == 1 { Ok(()) } else { wrong("does not match exactly one alternative") };
        }
        let is_of = |kind: &Value| match kind.as_str().unwrap() {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "integer" => value.is_u64(),
            "boolean" => value.is_boolean(),
            "null" => value.is_null(),
            other => panic!("unknown type {other}"),
        };
        let kinds = schema["type"].as_array().cloned().unwrap_or_else(|| vec![schema["type"].clone()]);
        if !kinds.iter().any(is_of) {
            return wrong("has the wrong type");
        }
        if schema["enum"].as_array().is_some_and(|allowed| !allowed.contains(value)) {
            return wrong("is not in the enum");
        }
        if schema.get("const").is_some_and(|only| only != value) {
            return wrong("is not the constant");
        }
        if let (Some(properties), Some(fields)) = (schema["properties"].as_object(), value.as_object()) {
            let required = schema["required"].as_array().unwrap();
            if let Some(missing) = required.iter().find(|name| !fields.contains_key(name.as_str().unwrap())) {
                return wrong(&format!("without {missing}"));
            }
            for (name, field) in fields {
                match properties.get(name) {
                    Some(schema) => self.check(schema, field)?,
                    None => return wrong(&format!("{name} is not described")),
                }
            }
        }
        value.as_array().into_iter().flatten().try_for_each(|item| self.check(&schema["items"], item))
    }

    fn assert_described(&self, path: &str, method: &str, reply: &Reply) {
        let schema = self.reply(path, method, reply.status);
        self.check(schema, &reply.json()).unwrap_or_else(|wrong| panic!("{method} {path} {}: {wrong}", reply.status));
    }
}

#[test]
fn description_covers_exactly_the_routes() {
    let host = Host::new();
    host.exercises(["route GET /doc"]);
    host.openwork(["daemon", "start"]).ok();
    let doc = Doc::of(&host);
    assert_eq!((&doc.0["openapi"], &doc.0["info"]["version"]), (&json!("3.1.0"), &json!(env!("CARGO_PKG_VERSION"))));
    let tables = host.openwork(["help"]).json();
    let row = |row: &Value| {
        let path = row["path"].as_str().unwrap().replace(":id", "{id}");
        (path, row["method"].as_str().unwrap().to_lowercase())
    };
    let mut routes: BTreeSet<_> = tables["routes"].as_array().unwrap().iter().map(row).collect();
    routes.insert(("/w/{id}/{path}".to_owned(), "get".to_owned()));
    routes.insert(("/api/{path}".to_owned(), "get".to_owned()));
    let paths = doc.0["paths"].as_object().unwrap();
    let methods = |(path, item): (&String, &Value)| {
        item.as_object().unwrap().keys().map(|method| (path.clone(), method.clone())).collect::<Vec<_>>()
    };
    assert_eq!(paths.iter().flat_map(methods).collect::<BTreeSet<_>>(), routes);

    let errors = tables["errors"].as_array().unwrap().iter();
    let codes: Vec<_> = errors.filter(|row| row["http"] != json!([])).map(|row| row["code"].clone()).collect();
    assert_eq!(doc.0["components"]["schemas"]["Error"]["properties"]["code"]["enum"], Value::Array(codes));
}

#[test]
fn replies_match_the_description() {
    let host = Host::new();
    host.exercises(["route GET /instances"]);
    host.openwork(["daemon", "start"]).ok();
    let doc = Doc::of(&host);
    let project = host.project("a");
    let gone = host.project("gone");
    host.add(&gone);
    let mut events = host.http("GET", "/events").events();
    let remote = json!({"baseUrl": "https://example.com", "directory": "/srv"});
    for (method, target, path, body, status) in [
        ("GET", "/health", "/health", None, 200),
        ("POST", "/workspaces", "/workspaces", Some(json!({"path": project})), 201),
        ("POST", "/workspaces", "/workspaces", Some(json!({"path": project, "name": "b"})), 200),
        ("POST", "/workspaces/remote", "/workspaces/remote", Some(remote), 201),
        ("PATCH", "/workspaces/b", "/workspaces/{id}", Some(json!({"name": "a"})), 200),
        ("POST", "/workspaces/a/activate", "/workspaces/{id}/activate", None, 200),
        ("POST", "/workspaces/a/move", "/workspaces/{id}/move", Some(json!({"path": project})), 200),
        ("GET", "/workspaces/a/path", "/workspaces/{id}/path", None, 200),
        ("GET", "/workspaces/a", "/workspaces/{id}", None, 200),
        ("GET", "/instances", "/instances", None, 200),
        ("GET", "/sessions", "/sessions", None, 200),
        ("GET", "/workspaces/a/sessions", "/workspaces/{id}/sessions", None, 200),
        ("POST", "/sessions/ses_fake/abort", "/sessions/{id}/abort", None, 200),
        ("GET", "/idle", "/idle", None, 200),
        ("GET", "/workspaces/a/idle", "/workspaces/{id}/idle", None, 200),
        ("POST", "/instances/a/dispose", "/instances/{id}/dispose", Some(json!({"force": true})), 200),
        ("POST", "/instances/a/reset", "/instances/{id}/reset", None, 200),
        ("GET", "/workspaces/none", "/workspaces/{id}", None, 404),
        ("POST", "/workspaces", "/workspaces", Some(json!({"path": "relative"})), 400),
        ("DELETE", "/workspaces/a", "/workspaces/{id}", None, 200),
        ("POST", "/start", "/start", None, 200),
    ] {
        let request = host.http(method, target);
        let reply = match body {
            Some(body) => request.json(body).send(),
            None => request.send(),
        };
        assert_eq!(reply.status, status, "{method} {target}: {reply:?}");
        doc.assert_described(path, &method.to_lowercase(), &reply);
    }
    std::fs::remove_dir(&gone).unwrap();
    doc.assert_described("/workspaces", "get", &host.http("GET", "/workspaces").send());

    // Collect the kinds of events up to the last change.
    let event = doc.reply("/events", "get", 200);
    let mut seen = BTreeSet::new();
    while !seen.contains("workspace.removed") {
        let told = events.find(|_| true).expect("an event");
        doc.check(event, &told).unwrap();
        seen.insert(told["type"].as_str().unwrap().to_owned());
    }
    assert_eq!(seen.len(), 5, "{seen:?}");
    let stopped = host.http("POST", "/shutdown").json(json!({})).send();
    doc.assert_described("/shutdown", "post", &stopped);
}
