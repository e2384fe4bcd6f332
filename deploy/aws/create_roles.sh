#!/usr/bin/env bash
# Makes the two instance profiles that ray_cluster.yaml names, uipe-head and uipe-worker, with the rights in this folder. Run it
# once per account, as someone who may change IAM; run again, it brings the rights up to date.
#
#   bash deploy/aws/create_roles.sh BUCKET       # the bucket of s3:// outputs and caches; - for none
#
# Who runs `ray up` needs the rights in user_policy.json. Remove all again:
#   for name in uipe-head uipe-worker; do
#     aws iam remove-role-from-instance-profile --instance-profile-name $name --role-name $name
#     aws iam delete-instance-profile --instance-profile-name $name
#     for policy in nodes bucket; do aws iam delete-role-policy --role-name $name --policy-name $policy; done
#     aws iam delete-role --role-name $name
#   done
set -euo pipefail
bucket="${1:?name the bucket of s3:// outputs, or - for none}"
here="$(cd "$(dirname "$0")" && pwd)"
trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]}'

for name in uipe-head uipe-worker; do
  if ! aws iam get-role --role-name "$name" > /dev/null 2>&1; then
    aws iam create-role --role-name "$name" --assume-role-policy-document "$trust" > /dev/null
  fi
  if ! aws iam get-instance-profile --instance-profile-name "$name" > /dev/null 2>&1; then
    aws iam create-instance-profile --instance-profile-name "$name" > /dev/null
    aws iam add-role-to-instance-profile --instance-profile-name "$name" --role-name "$name"
  fi
  if test "$bucket" != -; then
    rights="$(sed "s/YOUR-BUCKET/$bucket/" "$here/bucket_policy.json")"
    aws iam put-role-policy --role-name "$name" --policy-name bucket --policy-document "$rights"
  fi
done
aws iam put-role-policy --role-name uipe-head --policy-name nodes --policy-document "file://$here/head_policy.json"
echo "instance profiles uipe-head and uipe-worker are ready"
