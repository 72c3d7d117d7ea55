//! Requests to the API as its administrator, and the account of the agent.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{
    Api, Config,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{GroupVersionKind, Request},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::KubeServer;

/// A client with all rights.
pub struct KubeClient<'a> {
    server: &'a KubeServer,
    runtime: Runtime,
    client: kube::Client,
}

impl<'a> KubeClient<'a> {
    /// Creates one with the server's certificate, which must exist. Sends nothing yet.
    pub fn connect(server: &'a KubeServer) -> Result<Self> {
        let config: Kubeconfig = serde_json::from_value(server.kubeconfig())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(async {
            let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
            anyhow::Ok(kube::Client::try_from(config)?)
        })?;
        Ok(Self { server, runtime, client })
    }

    /// Waits for an answer in the namespace of the API.
    fn wait<T: Send>(&self, asking: impl Future<Output = kube::Result<T>> + Send) -> Result<T> {
        let answer = self.server.sandbox().netns.run(|| self.runtime.block_on(asking))?;
        answer.with_context(|| "asking the API".to_owned())
    }

    /// GET, with the body as it is.
    pub fn text(&self, path: &str) -> Result<String> {
        let request = Request::new(path).list(&ListParams::default())?;
        self.wait(self.client.request_text(request))
    }

    fn api(&self, object: &Value) -> Result<Api<DynamicObject>> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let version = text(&object["apiVersion"]).context("an object without apiVersion")?;
        let kind = text(&object["kind"]).context("an object without kind")?;
        let (group, version) = version.split_once('/').unwrap_or(("", &version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
        let client = self.client.clone();
        Ok(match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(client, namespace, &resource),
            None => Api::all_with(client, &resource),
        })
    }

    /// Creates an object and returns it.
    pub fn create(&self, object: &Value) -> Result<Value> {
        let api = self.api(object)?;
        let dynamic: DynamicObject = serde_json::from_value(object.clone())?;
        let made = self.wait(async { api.create(&PostParams::default(), &dynamic).await });
        Ok(serde_json::to_value(made.with_context(|| format!("making {object}"))?)?)
    }

    /// Merges a change into an object, which is named by its kind, namespace and name.
    pub fn patch(&self, object: &Value, change: &Value) -> Result<()> {
        let (api, name) = (self.api(object)?, name(object)?);
        let (parameters, change) = (PatchParams::default(), Patch::Merge(change));
        self.wait(async { api.patch(name, &parameters, &change).await }).map(drop)
    }

    /// As `merge`, for its status.
    pub fn patch_status(&self, object: &Value, status: &Value) -> Result<()> {
        let (api, name) = (self.api(object)?, name(object)?);
        let change = Patch::Merge(json!({ "status": status }));
        let parameters = PatchParams::default();
        self.wait(async { api.patch_status(name, &parameters, &change).await }).map(drop)
    }

    /// Deletes an object after its owner has finished.
    pub fn delete(&self, object: &Value) -> Result<()> {
        self.delete_with(object, &DeleteParams::default())
    }

    /// Deletes an object without a grace period.
    pub fn delete_at_once(&self, object: &Value) -> Result<()> {
        self.delete_with(object, &DeleteParams::default().grace_period(0))
    }

    fn delete_with(&self, object: &Value, parameters: &DeleteParams) -> Result<()> {
        let (api, name) = (self.api(object)?, name(object)?);
        self.wait(async { api.delete(name, parameters).await }).map(drop)
    }

    /// The objects of the kind and namespace of this one.
    pub fn list(&self, like: &Value) -> Result<Vec<Value>> {
        let api = self.api(like)?;
        let list = self.wait(async { api.list(&ListParams::default()).await })?;
        list.items.into_iter().map(|object| Ok(serde_json::to_value(object)?)).collect()
    }

    /// Creates the account and rights of the agent from deploy/intercept.yaml.
    pub fn deploy(&self) -> Result<Deployed> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/intercept.yaml");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text).context("reading the manifests")?;
        let find = |kind: &str| {
            let found = objects.iter().find(|object| object["kind"] == kind);
            found.cloned().with_context(|| format!("{} has no {kind}", path.display()))
        };
        let account = find("ServiceAccount")?;
        let role = find("ClusterRole")?;
        for object in [&find("Namespace")?, &account, &role, &find("ClusterRoleBinding")?] {
            self.create(object)?;
        }
        Ok(Deployed { account, role })
    }

    /// Writes the folder of an account, as the kubelet mounts it. Returns its name within /run/secrets.
    pub fn write_secrets(&self, account: &Value, folder: &Path) -> Result<PathBuf> {
        let namespace = account["metadata"]["namespace"].as_str().context("an account without namespace")?;
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        // The layout of `projected` volumes.
        let spec = TokenRequestSpec { expiration_seconds: Some(3607), ..TokenRequestSpec::default() };
        let request = TokenRequest { spec, ..TokenRequest::default() };
        let (name, parameters) = (name(account)?, PostParams::default());
        let answer = self.wait(async { accounts.create_token_request(name, &parameters, &request).await })?;
        let secrets = folder.join("kubernetes.io/serviceaccount");
        fs::create_dir_all(&secrets)?;
        fs::write(secrets.join("token"), answer.status.context("no token in the answer")?.token)?;
        fs::write(secrets.join("namespace"), namespace)?;
        fs::copy(self.server.authority(), secrets.join("ca.crt"))?;
        Ok(secrets)
    }
}

/// The agent's account and its rights.
#[derive(Debug)]
pub struct Deployed {
    /// The ServiceAccount.
    pub account: Value,
    /// The ClusterRole.
    pub role: Value,
}

fn name(object: &Value) -> Result<&str> {
    object["metadata"]["name"].as_str().context("an object without name")
}
