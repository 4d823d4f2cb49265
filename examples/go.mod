module github.com/seed-ecb488c9/connpool/examples

go 1.26.0

replace github.com/seed-ecb488c9/connpool => ../

require (
	github.com/apache/thrift v0.25.0
	github.com/mdlayher/vsock v1.4.0
	github.com/seed-ecb488c9/connpool v0.0.0
	github.com/stretchr/testify v1.12.1
	golang.org/x/net v0.62.0
)

require (
	github.com/hashicorp/golang-lru/v2 v2.0.7 // indirect
	github.com/mdlayher/socket v0.8.0 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/sync v0.24.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
)
